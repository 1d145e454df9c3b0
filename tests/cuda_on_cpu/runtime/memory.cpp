// memory.cpp - shared-memory addresses, single accesses, atomics and cp.async.
#include <cstring>
#include <mutex>

#include "device.h"
#include "failure.h"
#include "memory_checker.h"
#include "state.h"

namespace emulator {
namespace {

void check_aligned(const void* address, size_t bytes, const char* what, Site site) {
  const size_t excess = reinterpret_cast<uintptr_t>(address) % bytes;
  if (excess) fail(current_thread(), site, "misaligned %zu-byte %s, at %zu past a multiple of it", bytes, what, excess);
}

}  // namespace

unsigned char* shared_memory(size_t bytes, Site site) {
  const size_t given = current_worker->launch->shared_bytes;
  if (bytes > given)
    fail(current_thread(), site, "the kernel uses %zu bytes of shared memory and was launched with %zu", bytes, given);
  return current_worker->shared;
}

SharedAddress shared_address(const void* pointer, Site site) {
  const size_t offset = static_cast<const unsigned char*>(pointer) - current_worker->shared;
  if (offset >= kMaxSharedBytes) fail(current_thread(), site, "%p is not in shared memory", pointer);
  return static_cast<SharedAddress>(offset);
}

unsigned char* shared_pointer(SharedAddress address, size_t bytes, Site site) {
  const size_t given = current_worker->launch->shared_bytes;
  if (address + bytes > given)
    fail(current_thread(), site, "%zu bytes out of bounds of shared memory: at byte %u of %zu", bytes, address, given);
  return current_worker->shared + address;
}

void read_memory(void* value, const void* address, size_t bytes, Site site) {
  check_aligned(address, bytes, "read", site);
  check_access(current_thread(), address, bytes, bytes, Access::read, site);
  std::memcpy(value, address, bytes);
}

void write_memory(void* address, const void* value, size_t bytes, Site site) {
  check_aligned(address, bytes, "write", site);
  check_access(current_thread(), address, bytes, bytes, Access::write, site);
  std::memcpy(address, value, bytes);
}

void atomic_update(void* address, size_t bytes, AtomicUpdate update, const void* operand, void* previous, Site site) {
  // One lock for all addresses: atomics are rare, and blocks on other OS threads may use the same one.
  static std::mutex mutex;
  check_aligned(address, bytes, "atomic", site);
  check_access(current_thread(), address, bytes, bytes, Access::atomic, site);
  std::lock_guard<std::mutex> lock(mutex);
  // `update` is instrumented code, to which the address itself would look like a plain access.
  alignas(16) unsigned char value[16];
  std::memcpy(value, address, bytes);
  std::memcpy(previous, value, bytes);
  update(value, operand);
  std::memcpy(address, value, bytes);
}

// ---- cp.async
//
// The copy is made when it is waited for, and its destination holds NaN until then: a missing wait shows in the values
// even in the plain build.

void async_copy(SharedAddress destination, const void* source, int bytes, int valid_bytes, Site site) {
  Thread& self = current_thread();
  unsigned char* target = shared_pointer(destination, bytes, site);
  check_aligned(target, bytes, "cp.async destination", site);
  check_aligned(source, bytes, "cp.async source", site);
  if (valid_bytes > 0) check_access(self, source, valid_bytes, 1, Access::read, site);
  check_access(self, target, bytes, bytes, Access::async_issue, site);
  std::memset(target, 0xff, bytes);
  self.copies.push_back({destination, source, bytes, valid_bytes, site});
  ++self.uncommitted_copies;
}

void async_copy_commit(Site) {
  Thread& self = current_thread();
  self.copy_groups.push_back(self.uncommitted_copies);
  self.uncommitted_copies = 0;
}

void async_copy_wait(int pending_groups, Site) {
  Thread& self = current_thread();
  if (static_cast<int>(self.copy_groups.size()) <= pending_groups) return;
  const auto first_pending = self.copy_groups.end() - pending_groups;
  size_t arrived = 0;
  for (auto group = self.copy_groups.begin(); group != first_pending; ++group) arrived += *group;
  for (size_t i = 0; i < arrived; ++i) {
    const AsyncCopy& copy = self.copies[i];
    unsigned char* target = shared_pointer(copy.destination, copy.bytes, copy.site);
    check_access(self, target, copy.bytes, copy.bytes, Access::async_arrival, copy.site);
    std::memcpy(target, copy.source, copy.valid_bytes);
    std::memset(target + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + arrived);
  self.copy_groups.erase(self.copy_groups.begin(), first_pending);
}

}  // namespace emulator
