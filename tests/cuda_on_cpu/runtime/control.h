// control.h - the emulator as host code sees it: launching, schedules, what was counted, the memory that kernels may
// use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "site.h"

namespace emulator {

// Runs `body` once for every thread of every block and returns when all are done. Throws Error at the first rule that
// a thread breaks; the other blocks are then abandoned, so what they would have written is undefined.
//   instance      the kernel's name, as executed() counts it and errors name it
//   shared_bytes  dynamic shared memory of a block, filled with NaN before the block starts
void launch(const char* instance, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body);

// False in the null build, which measures the host's time: a launch is counted, and nothing runs.
extern const bool launches_run;

// In which order the threads that could run do run, and the order in which blocks start. A kernel free of races gives
// the same bits in all of them.
enum class Order {
  forward,  // lowest thread first, each as far as it gets
  reverse,  // highest first
  random,   // drawn from the seed; threads also give way at every barrier and warp collective
};

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 1;
  int os_threads = 0;  // OS threads that blocks are spread over; 0: as many as the machine has
};

void set_schedule(const Schedule& schedule);

// Launches by instance name since the last reset_counters().
std::map<std::string, int64_t> executed();

// What kernels did since the last reset_counters(). The bytes are those that threads asked for: no cache is modelled.
struct Counters {
  std::map<std::string, int64_t> bytes_read;      // by buffer name; checked build only
  std::map<std::string, int64_t> bytes_written;   // by buffer name; checked build only
  std::map<std::string, int64_t> bank_conflicts;  // by "file:line": extra cycles of ldmatrix and stmatrix
  std::map<std::string, int> shared_bytes;        // by instance name: dynamic, of a block; the most of all launches
};
Counters counters();
void reset_counters();

// Whether device code of this module is instrumented, so that every access to memory is checked.
bool is_checked();

class GlobalMemory;

// Names the global memory that launches may touch while the scope lives. In the checked build any access outside it
// is an error, as is a write to an input and a read of an output's byte that nothing has written. Scopes belong to
// the thread that makes them; the innermost one counts. Add all buffers before the first launch. With no scope, or an
// empty one, global memory is not checked. Buffers may overlap.
class BufferScope {
 public:
  BufferScope();
  ~BufferScope();
  BufferScope(const BufferScope&) = delete;
  BufferScope& operator=(const BufferScope&) = delete;

  void input(const char* name, const void* data, size_t bytes);  // kernels may only read it
  void output(const char* name, void* data, size_t bytes);       // garbage at first: must be written before it is read
  void inout(const char* name, void* data, size_t bytes);        // holds values that kernels may read and write

 private:
  std::unique_ptr<GlobalMemory> memory_;
  BufferScope* outer_;
  friend GlobalMemory* current_global_memory();
};

// Memory that ends at an unreadable page, so that even the plain build sees an access past its end: it becomes an
// Error. Starts at a multiple of 16, hence up to 15 bytes after an odd size are readable. Filled with NaN.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  void* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  unsigned char* mapping_;
  size_t mapping_bytes_;
  unsigned char* data_;
  size_t bytes_;
};

}  // namespace emulator
