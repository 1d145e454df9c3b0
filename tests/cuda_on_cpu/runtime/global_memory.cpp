#include "global_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "failure.h"
#include "state.h"

namespace emulator {

void GlobalMemory::add(const char* name, const void* data, size_t bytes, bool writable, Contents contents) {
  if (data == nullptr || bytes == 0) return;  // an absent tensor
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  buffers_.push_back({name, begin, begin + bytes, writable, contents});
  regions_.clear();
}

void GlobalMemory::begin_launch() {
  if (regions_.empty()) build_regions();
  for (Region& region : regions_) region.shadow.forget_accesses();
}

void GlobalMemory::build_regions() {
  constexpr uintptr_t kAlignment = Shadow<kGlobalReaders>::kGranule;
  std::vector<const Buffer*> ordered;
  for (const Buffer& buffer : buffers_) ordered.push_back(&buffer);
  std::sort(ordered.begin(), ordered.end(), [](const Buffer* a, const Buffer* b) { return a->begin < b->begin; });
  for (const Buffer* buffer : ordered) {
    if (!regions_.empty() && buffer->begin < regions_.back().end)
      regions_.back().end = std::max(regions_.back().end, buffer->end);
    else
      regions_.push_back({buffer->begin & ~(kAlignment - 1), buffer->end, {}});
  }
  for (Region& region : regions_) {
    region.shadow.reset(region.end - region.begin, Contents::garbage);
    for (const Buffer& buffer : buffers_)
      if (buffer.begin >= region.begin && buffer.begin < region.end && buffer.contents == Contents::value)
        region.shadow.set_contents(buffer.begin - region.begin, buffer.end - buffer.begin, Contents::value);
  }
}

const GlobalMemory::Buffer* GlobalMemory::find(uintptr_t address, size_t bytes, bool for_write) const {
  const Buffer* found = nullptr;
  for (const Buffer& buffer : buffers_) {
    if (address < buffer.begin || address + bytes > buffer.end) continue;
    if (!for_write || buffer.writable) return &buffer;
    found = &buffer;
  }
  return found;
}

bool GlobalMemory::access(uintptr_t address, size_t bytes, Access access, const Thread& thread, Origin origin,
                          std::vector<BufferTraffic>& traffic) {
  const Buffer* buffer = find(address, bytes, !is_read(access));
  if (!buffer) return false;
  if (!is_read(access) && !buffer->writable)
    fail(thread, origin, "write to the input %s at byte %zu", buffer->name.c_str(), address - buffer->begin);
  for (Region& region : regions_) {
    if (address < region.begin || address >= region.end) continue;
    region.shadow.access(address - region.begin, bytes, access, thread, origin, buffer->name.c_str());
  }
  BufferTraffic& counted = traffic[buffer - buffers_.data()];
  if (access != Access::write) counted.read += bytes;
  if (!is_read(access)) counted.written += bytes;
  return true;
}

std::string GlobalMemory::describe_outside(uintptr_t address) const {
  const Buffer* nearest = nullptr;
  uintptr_t nearest_distance = UINTPTR_MAX;
  for (const Buffer& buffer : buffers_) {
    const uintptr_t distance = address < buffer.begin ? buffer.begin - address
                               : address < buffer.end ? 0
                                                      : address - buffer.end;
    if (distance >= nearest_distance) continue;
    nearest = &buffer;
    nearest_distance = distance;
  }
  const std::string size = std::to_string(nearest->end - nearest->begin);
  const bool before = address < nearest->begin;
  if (nearest_distance == 0 && address < nearest->end)
    return "at byte " + std::to_string(address - nearest->begin) + ", across the end of " + nearest->name + " (" +
           size + " bytes)";
  return std::to_string(nearest_distance) + " bytes " + (before ? "before the start" : "past the end") + " of " +
         nearest->name + " (" + size + " bytes)";
}

// ---- scopes

namespace {
thread_local BufferScope* innermost_scope = nullptr;
}

BufferScope::BufferScope() : memory_(new GlobalMemory), outer_(innermost_scope) { innermost_scope = this; }
BufferScope::~BufferScope() { innermost_scope = outer_; }

void BufferScope::input(const char* name, const void* data, size_t bytes) {
  memory_->add(name, data, bytes, false, Contents::value);
}
void BufferScope::output(const char* name, void* data, size_t bytes) {
  memory_->add(name, data, bytes, true, Contents::garbage);
}
void BufferScope::inout(const char* name, void* data, size_t bytes) {
  memory_->add(name, data, bytes, true, Contents::value);
}

GlobalMemory* current_global_memory() { return innermost_scope ? innermost_scope->memory_.get() : nullptr; }

// ---- guarded memory

GuardedMemory::GuardedMemory(size_t bytes) : bytes_(bytes) {
  constexpr size_t kAlignment = 16;
  const size_t page = sysconf(_SC_PAGESIZE);
  const size_t aligned_bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t usable = (aligned_bytes + page - 1) / page * page;
  mapping_bytes_ = usable + 2 * page;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(mapping);
  mprotect(mapping_ + page, usable, PROT_READ | PROT_WRITE);
  std::memset(mapping_ + page, 0xff, usable);
  data_ = mapping_ + page + usable - aligned_bytes;
}

GuardedMemory::~GuardedMemory() { munmap(mapping_, mapping_bytes_); }

}  // namespace emulator
