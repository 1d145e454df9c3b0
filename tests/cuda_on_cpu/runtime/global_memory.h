// global_memory.h - the registered buffers of a scope, and what the checked build knows of them. Internal.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shadow.h"

namespace emulator {

// Readers that a granule of global memory remembers: with those of two blocks known, no writer of a third, or of
// either, goes unseen.
constexpr int kGlobalReaders = 2;

// Bytes that threads asked for.
struct BufferTraffic {
  int64_t read = 0;
  int64_t written = 0;
};

class GlobalMemory {
 public:
  void add(const char* name, const void* data, size_t bytes, bool writable, Contents contents);
  bool empty() const { return buffers_.empty(); }
  size_t buffer_count() const { return buffers_.size(); }
  const std::string& buffer_name(size_t index) const { return buffers_[index].name; }

  // Forgets who accessed what, as launches follow each other in order, but not what has been written.
  void begin_launch();

  // Checks an access by `thread` and adds it to `traffic`. False if the address is in no buffer.
  bool access(uintptr_t address, size_t bytes, Access access, const Thread& thread, Origin origin,
              std::vector<BufferTraffic>& traffic);

  // Where an address that is in no buffer lies, from the nearest buffer.
  std::string describe_outside(uintptr_t address) const;

 private:
  struct Buffer {
    std::string name;
    uintptr_t begin, end;
    bool writable;
    Contents contents;
  };
  // Buffers that overlap share their bytes' shadow.
  struct Region {
    uintptr_t begin, end;
    Shadow<kGlobalReaders> shadow;
  };

  void build_regions();
  const Buffer* find(uintptr_t address, size_t bytes, bool for_write) const;

  std::vector<Buffer> buffers_;
  std::vector<Region> regions_;
};

// The innermost scope's, of this OS thread; null if there is none.
GlobalMemory* current_global_memory();

}  // namespace emulator
