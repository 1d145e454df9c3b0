// context.h - stacks and switches between them.
#pragma once

#include <cstddef>

namespace emulator {

// A suspended execution: where to go on, on a stack of its own.
struct Context {
  void* stack_pointer = nullptr;
};

// Makes `context` start `entry`, which must never return, on the stack that ends at `stack_top`.
void start_context(Context& context, unsigned char* stack_top, void (*entry)());

// Suspends the running execution into `from` and goes on with `to`.
void switch_context(Context& from, Context& to);

// The stacks of a worker's fibers, each above an unreadable page so that an overflow cannot reach its neighbour.
class FiberStacks {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;  // address space: pages that nothing touches cost nothing

  FiberStacks() = default;
  ~FiberStacks();
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;

  void reserve(int count);  // at least `count` stacks; contents are lost
  unsigned char* top(int index) const { return mapping_ + (index + 1) * kStackBytes; }
  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(address) - mapping_) < count_ * kStackBytes;
  }

 private:
  unsigned char* mapping_ = nullptr;
  size_t count_ = 0;
};

}  // namespace emulator
