// failure.h - how a broken rule is reported.
#pragma once

#include <string>

#include "origin.h"

namespace emulator {

struct Thread;
struct Worker;

// Ends the running block: launch() will throw an Error that names `thread` and `origin`. To be called on a fiber; its
// stack is dropped, never unwound, as kernels have no destructors worth running.
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(const Thread& thread, Origin origin, const char* format,
                                                             ...);

// Ends the running block because no thread can run.
[[noreturn]] void fail_deadlock();

// The error's text. Runs on the OS thread's own stack.
std::string describe_failure(const Worker& worker);

}  // namespace emulator
