// shadow.h - who last read and wrote every piece of memory, and whether there is a race or an uninitialised read.
//
// The rule is that of vector clocks. Every thread counts its own steps from barrier to barrier and knows, through the
// barriers that it passed, how far each other thread had come. An access that the accessing thread does not know to be
// over is concurrent with its own; two concurrent accesses to one place, one of them a write, are a race. It is found
// in whatever order the threads happened to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "origin.h"

namespace emulator {

struct Thread;

enum class Access {
  read,
  write,
  atomic,         // a read and a write, never racing with another atomic
  async_issue,    // cp.async was issued: the bytes are in flight
  async_arrival,  // cp.async was waited for: the bytes are there
};

inline bool is_read(Access access) { return access == Access::read; }

// One access, as it is remembered.
struct AccessRecord {
  uint32_t clock = 0;  // the thread's own step; 0: no access
  uint32_t block = 0;  // threads of different blocks never know of each other's steps
  Origin origin;
  uint16_t thread = 0;  // within the block
  bool atomic = false;
};

// What is known of kGranule bytes.
template <int Readers>
struct ShadowCell {
  AccessRecord write;
  AccessRecord reads[Readers];
};

enum class Contents : uint8_t { garbage, in_flight, value };

// The shadow of one range of memory. Blocks on several OS threads share the shadow of global memory without a lock:
// a record torn between two of them is a record of two blocks that touch the same bytes, and a write that meets it
// races with one of the two whatever it says.
template <int Readers>
class Shadow {
 public:
  // The smallest element of any supported dtype. Two threads that write the two bytes of one granule look like a race.
  static constexpr size_t kGranule = 2;

  void reset(size_t bytes, Contents contents);
  void forget_accesses();
  void set_contents(size_t offset, size_t bytes, Contents contents);

  // Checks and records an access by `thread`; `space` says in messages what `offset` is an offset into.
  void access(size_t offset, size_t bytes, Access access, const Thread& thread, Origin origin, const char* space);

 private:
  std::vector<ShadowCell<Readers>> cells_;
  std::vector<Contents> contents_;
};

}  // namespace emulator
