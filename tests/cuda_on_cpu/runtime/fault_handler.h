// fault_handler.h - an access to unreadable memory by a kernel becomes an Error instead of the end of the process.
#pragma once

namespace emulator {

struct Worker;

// While it lives, a segmentation fault of a fiber of this OS thread fails the running block: a guard page after a
// buffer, a wild pointer, a stack overflow. Other faults go to whoever handled them before.
class FaultsBecomeErrors {
 public:
  explicit FaultsBecomeErrors(Worker& worker);
  ~FaultsBecomeErrors();
  FaultsBecomeErrors(const FaultsBecomeErrors&) = delete;
  FaultsBecomeErrors& operator=(const FaultsBecomeErrors&) = delete;

 private:
  struct PreviousStack;
  PreviousStack* previous_;
};

}  // namespace emulator
