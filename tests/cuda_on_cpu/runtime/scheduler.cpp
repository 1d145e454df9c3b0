#include "scheduler.h"

#include <exception>
#include <string>

#include "barrier.h"
#include "failure.h"
#include "state.h"

namespace emulator {
namespace {

// Goes on with the next ready thread; returns when the running thread is chosen again.
void reschedule() {
  Worker& worker = *current_worker;
  Thread& self = *worker.running;
  const int index = worker.ready.take();
  if (index == ReadySet::kNone) {
    if (worker.block.live > 0) fail_deadlock();
    switch_context(self.context, worker.scheduler);
    return;
  }
  Thread& next = worker.block.threads[index];
  if (&next == &self) return;
  worker.running = &next;
  switch_context(self.context, next.context);
}

void check_exit(const Thread& self) {
  if (!self.copies.empty())
    fail(self, self.copies[0].site, "exits with %zu cp.async that it never waited for", self.copies.size());
  for (const PendingCollective& pending : self.block->collectives[self.warp()])
    if (pending.arguments.mask >> self.lane() & 1)
      fail(self, pending.site, "exits while other lanes wait for it in %s", pending.name);
}

// Where every fiber starts.
void thread_main() {
  std::string exception;  // reported after the handler, which a dropped fiber would never leave
  try {
    (*current_worker->launch->body)();
  } catch (const std::exception& error) {
    exception = error.what();
  }
  if (!exception.empty())
    fail(current_thread(), Site::here(), "a C++ exception left the kernel: %s", exception.c_str());
  Thread& self = current_thread();
  check_exit(self);
  self.status = Status::exited;
  leave_barriers(self);
  for (;;) reschedule();
}

}  // namespace

void run_block(Worker& worker) {
  for (Thread& thread : worker.block.threads) {
    start_context(thread.context, worker.stacks.top(thread.index), FiberStacks::kStackBytes, thread_main);
    wake(thread);
  }
  worker.running = &worker.block.threads[worker.ready.take()];
  switch_context(worker.scheduler, worker.running->context);
  worker.running = nullptr;
}

void wait_here(const char* what, Site site) {
  Thread& self = current_thread();
  self.status = Status::waiting;
  self.waits_for = what;
  self.waits_at = site;
  reschedule();
}

void wake(Thread& thread) {
  thread.status = Status::ready;
  current_worker->ready.insert(thread.index);
}

void give_way() {
  if (!current_worker->ready.random()) return;
  wake(current_thread());
  reschedule();
}

}  // namespace emulator
