#include "failure.h"

#include <cstdarg>
#include <cstdio>

#include "state.h"

namespace emulator {
namespace {

[[noreturn]] void leave_fiber() {
  Context dropped;
  switch_context(dropped, current_worker->scheduler);
  __builtin_unreachable();
}

std::string describe_thread(const Worker& worker, const Thread& thread) {
  std::string text = worker.launch->instance;
  text += ", block " + std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index);
  return text + " (warp " + std::to_string(thread.warp()) + ", lane " + std::to_string(thread.lane()) + "): ";
}

std::string describe_wait(const Thread& thread) {
  if (thread.status == Status::exited) return "exited";
  return std::string("waiting at ") + thread.waits_for + " " + Origin(thread.waits_at).describe();
}

// One line for every run of threads that wait at the same place.
std::string describe_deadlock(const Worker& worker) {
  std::string text = std::string(worker.launch->instance) + ": deadlock, no thread can go on";
  const std::vector<Thread>& threads = worker.block.threads;
  size_t first = 0;
  for (size_t i = 1; i <= threads.size(); ++i) {
    const std::string wait = describe_wait(threads[first]);
    if (i < threads.size() && describe_wait(threads[i]) == wait) continue;
    text += "\n    block " + std::to_string(worker.block.index) + ", ";
    text += first == i - 1 ? "thread " + std::to_string(first)
                           : "threads " + std::to_string(first) + "-" + std::to_string(i - 1);
    text += ": " + wait;
    first = i;
  }
  return text;
}

}  // namespace

void fail(const Thread& thread, Origin origin, const char* format, ...) {
  char what[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  Failure& failure = current_worker->failure;
  failure.happened = true;
  failure.thread = &thread;
  failure.what = what;
  failure.origin = origin;
  leave_fiber();
}

void fail_deadlock() {
  current_worker->failure.happened = true;
  current_worker->failure.deadlock = true;
  leave_fiber();
}

std::string describe_failure(const Worker& worker) {
  const Failure& failure = worker.failure;
  if (failure.deadlock) return describe_deadlock(worker);
  return describe_thread(worker, *failure.thread) + failure.what + " [" + failure.origin.describe() + "]";
}

}  // namespace emulator
