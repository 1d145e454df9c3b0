#include "barrier.h"

#include <algorithm>

#include "failure.h"
#include "scheduler.h"

namespace emulator {

void join_clock(VectorClock& clock, const VectorClock& other) {
  if (clock.size() != other.size()) clock.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void begin_step(Thread& thread) { ++thread.clock[thread.index]; }

namespace {

// All have come: what each knew, all who waited know.
void complete(Barrier& barrier) {
  const Thread* self = current_worker->running;
  for (Thread* thread : barrier.waiting) {
    if (checked_build) {
      thread->clock = barrier.clock;
      begin_step(*thread);
    }
    if (thread != self) wake(*thread);
  }
  barrier.arrived = 0;
  barrier.waiting.clear();
  barrier.clock.clear();
}

// Counts the running thread in and says whether it is the last one.
bool arrive(Barrier& barrier, int expected, int live, bool waits) {
  Thread& self = current_thread();
  ++barrier.arrived;
  if (checked_build) {
    join_clock(barrier.clock, self.clock);
    if (!waits) begin_step(self);
  }
  if (waits) barrier.waiting.push_back(&self);
  return barrier.arrived >= (expected ? expected : live);
}

void check_named_barrier(const Barrier& barrier, int id, int threads, Site site) {
  const Thread& self = current_thread();
  if (id < 0 || id >= kBarriers) fail(self, site, "barrier %d: there are %d", id, kBarriers);
  if (threads % kWarpSize != 0 || threads > current_worker->launch->threads)
    fail(self, site, "barrier %d: %d threads: must be a multiple of %d and at most the block's %d", id, threads,
         kWarpSize, current_worker->launch->threads);
  if (barrier.arrived == 0) return;
  if (barrier.expected != threads)
    fail(self, site, "barrier %d is for %d threads here and for %d at %s", id, threads, barrier.expected,
         Origin(barrier.first_site).describe().c_str());
  // __syncthreads in two branches hangs or worse on a device, though a count of arrivals would let it pass.
  if (threads == 0 && barrier.first_site.line != site.line)
    fail(self, site, "divergent __syncthreads: other threads wait at %s",
         Origin(barrier.first_site).describe().c_str());
}

void enter(int id, int threads, bool waits, Site site) {
  Block& block = current_block();
  Barrier& barrier = block.barriers[id & (kBarriers - 1)];
  check_named_barrier(barrier, id, threads, site);
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.first_site = site;
  }
  if (arrive(barrier, threads, block.live, waits)) {
    complete(barrier);
    if (waits) give_way();
  } else if (waits) {
    wait_here(threads ? "a named barrier" : "__syncthreads", site);
  }
}

}  // namespace

void barrier_sync(int id, int threads, Site site) { enter(id, threads, true, site); }
void barrier_arrive(int id, int threads, Site site) { enter(id, threads, false, site); }

void leave_barriers(Thread& thread) {
  Block& block = *thread.block;
  --block.live;
  Barrier& all_threads = block.barriers[0];
  if (all_threads.arrived && all_threads.expected == 0 && block.live && all_threads.arrived >= block.live)
    complete(all_threads);
}

}  // namespace emulator
