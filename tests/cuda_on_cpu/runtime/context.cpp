#include "context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace emulator {

// swapcontext costs a system call a switch; this saves what x86-64's calling convention asks for and nothing more.
extern "C" void emulator_switch_stacks(void** saved_stack_pointer, void* next_stack_pointer);
asm(R"(
.text
.globl emulator_switch_stacks
.hidden emulator_switch_stacks
.type emulator_switch_stacks,@function
emulator_switch_stacks:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stacks, .-emulator_switch_stacks
)");

void start_context(Context& context, unsigned char* stack_top, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  const uintptr_t aligned_top = reinterpret_cast<uintptr_t>(stack_top) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(aligned_top - 16);
  frame[1] = nullptr;  // entry's return address: unwinding ends here
  frame[0] = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= kSavedRegisters; ++i) frame[-i] = nullptr;
  context.stack_pointer = frame - kSavedRegisters;
}

void switch_context(Context& from, Context& to) { emulator_switch_stacks(&from.stack_pointer, to.stack_pointer); }

FiberStacks::~FiberStacks() {
  if (mapping_) munmap(mapping_, count_ * kStackBytes);
}

void FiberStacks::reserve(int count) {
  if (static_cast<size_t>(count) <= count_) return;
  if (mapping_) munmap(mapping_, count_ * kStackBytes);
  mapping_ = nullptr;
  count_ = 0;
  void* mapping = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(mapping);
  count_ = count;
  const size_t page = sysconf(_SC_PAGESIZE);
  for (size_t i = 0; i < count_; ++i) mprotect(mapping_ + i * kStackBytes, page, PROT_NONE);
}

}  // namespace emulator
