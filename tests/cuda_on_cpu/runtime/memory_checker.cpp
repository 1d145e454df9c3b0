#include "memory_checker.h"

#include <link.h>
#include <pthread.h>

#include "failure.h"
#include "state.h"

namespace emulator {

bool checked_build = false;

bool is_checked() { return checked_build; }

namespace {

const char* verb(Access access) { return is_read(access) ? "read" : "write"; }

// Whether `address` is in the code or the static data of a loaded module: constant tables, string literals.
bool is_static_data(uintptr_t address) {
  thread_local Range last_hit;
  if (last_hit.contains(address)) return true;
  struct Search {
    uintptr_t address;
    Range found;
  } search{address, {}};
  auto visit = [](dl_phdr_info* module, size_t, void* argument) {
    auto* search = static_cast<Search*>(argument);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& header = module->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      const Range segment{module->dlpi_addr + header.p_vaddr, module->dlpi_addr + header.p_vaddr + header.p_memsz};
      if (!segment.contains(search->address)) continue;
      search->found = segment;
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &search);
  if (search.found.end) last_hit = search.found;
  return search.found.end != 0;
}

void check_shared(const Thread& thread, size_t offset, size_t bytes, Access access, Origin origin) {
  const size_t size = current_worker->launch->shared_bytes;
  if (offset + bytes > size)
    fail(thread, origin, "%zu-byte %s out of bounds of shared memory: at byte %zu of %zu", bytes, verb(access), offset,
         size);
  thread.block->shadow.access(offset, bytes, access, thread, origin, "shared memory");
}

void check_global(const Thread& thread, uintptr_t address, size_t bytes, Access access, Origin origin) {
  const Launch& launch = *current_worker->launch;
  if (!launch.memory) return;
  if (launch.memory->access(address, bytes, access, thread, origin, current_worker->traffic)) return;
  // Params and captured values lie on the launching thread's stack.
  if (launch.host_stack.contains(address) || is_static_data(address)) return;
  fail(thread, origin, "%zu-byte %s out of bounds of global memory: %s", bytes, verb(access),
       launch.memory->describe_outside(address).c_str());
}

}  // namespace

void check_access(const Thread& thread, const void* pointer, size_t bytes, size_t alignment, Access access,
                  Origin origin) {
  if (!checked_build || bytes == 0) return;
  Worker& worker = *current_worker;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (worker.stacks.contains(pointer)) return;  // a thread's own variables
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(worker.shared);
  const bool shared = offset < kMaxSharedBytes;
  if (address % alignment != 0)
    fail(thread, origin, "misaligned %zu-byte %s of %s memory, at %zu past a multiple of %zu", bytes, verb(access),
         shared ? "shared" : "global", address % alignment, alignment);
  if (shared)
    check_shared(thread, offset, bytes, access, origin);
  else
    check_global(thread, address, bytes, access, origin);
}

Range own_stack() {
  thread_local const Range stack = [] {
    pthread_attr_t attributes;
    void* lowest = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &lowest, &bytes);
      pthread_attr_destroy(&attributes);
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(lowest);
    return Range{begin, begin + bytes};
  }();
  return stack;
}

}  // namespace emulator
