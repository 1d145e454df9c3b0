// state.h - a running grid: launch, worker (one OS thread), block, thread. Internal to the emulator.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "control.h"
#include "device.h"
#include "global_memory.h"
#include "memory_checker.h"
#include "origin.h"
#include "ready_set.h"
#include "shadow.h"

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kBarriers = 16;
// Readers that a granule of shared memory remembers; of more concurrent ones some are forgotten.
constexpr int kSharedReaders = 3;
constexpr int kMaxSharedBytes = 227 * 1024;  // what sm_90 and sm_100 give a block

// How much of the execution of every thread of its block a thread knows to be over.
using VectorClock = std::vector<uint32_t>;

// A cp.async that was issued and not yet waited for.
struct AsyncCopy {
  SharedAddress destination;
  const void* source;
  int bytes, valid_bytes;
  Site site;
};

enum class Status : uint8_t { ready, waiting, exited };

struct Block;

// A thread of a kernel: a fiber.
struct Thread {
  Block* block;
  int index;  // within the block
  Status status;
  Context context;
  const char* waits_for;  // where status is waiting: the primitive's name, and its line
  Site waits_at;

  std::vector<AsyncCopy> copies;    // oldest first
  std::vector<size_t> copy_groups;  // committed groups: how many of `copies` each holds
  size_t uncommitted_copies;

  VectorClock clock;  // checked build only

  int warp() const { return index / kWarpSize; }
  int lane() const { return index % kWarpSize; }
};

// Barrier 0 with no thread count is __syncthreads.
struct Barrier {
  int arrived = 0;
  int expected = 0;  // 0: all threads that have not exited
  Site first_site{};
  std::vector<Thread*> waiting;
  VectorClock clock;  // of all who arrived
};

// A warp collective that some lanes have reached and others have not.
struct PendingCollective {
  const char* name;
  Site site;
  CollectiveBody body;
  uint32_t arrived;
  WarpArguments arguments;
};

struct Block {
  int64_t index;
  int live;  // threads that have not exited
  std::vector<Thread> threads;
  Barrier barriers[kBarriers];
  std::vector<std::vector<PendingCollective>> collectives;  // by warp
  Shadow<kSharedReaders> shadow;
};

// What all blocks of a launch share.
struct Launch {
  const char* instance;
  int64_t blocks;
  int threads;
  int shared_bytes;
  const std::function<void()>* body;
  Schedule schedule;
  GlobalMemory* memory;  // null: global memory is not checked
  Range host_stack;      // of the launching thread
};

// The first rule that was broken, as seen where it happened; worded later, off the fiber's small stack.
struct Failure {
  bool happened = false;
  bool deadlock = false;
  const Thread* thread = nullptr;
  std::string what;
  Origin origin{};
};

// One OS thread's share of a launch: runs one block after another. Kept from launch to launch for its mappings.
struct Worker {
  Worker();
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  const Launch* launch = nullptr;
  Block block;  // the running one
  FiberStacks stacks;
  unsigned char* shared = nullptr;  // its memory
  std::unique_ptr<unsigned char[]> signal_stack;

  ReadySet ready;
  Context scheduler;          // the OS thread's own stack
  Thread* running = nullptr;  // null while the scheduler's own stack runs
  Failure failure;

  std::vector<BufferTraffic> traffic;                             // by index of the launch's buffers
  std::map<std::pair<const char*, int>, int64_t> bank_conflicts;  // by site
};

// The worker that this OS thread runs, null outside launches. Initial-exec: threadIdx reads it, and a call for
// its address would cost more than the rest.
extern __attribute__((tls_model("initial-exec"))) thread_local Worker* current_worker;

inline Thread& current_thread() { return *current_worker->running; }
inline Block& current_block() { return *current_worker->running->block; }

}  // namespace emulator
