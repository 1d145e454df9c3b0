#include "fault_handler.h"

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <mutex>

#include "failure.h"
#include "state.h"

namespace emulator {
namespace {

constexpr size_t kSignalStackBytes = 64 * 1024;

struct sigaction previous_action;

struct Fault {
  const void* address;
  const void* instruction;
};
thread_local Fault fault;

// Runs after the handler has returned, on the signal stack, which nothing uses by then: the fiber's own may be full.
[[noreturn]] void report_fault() {
  const Thread& thread = current_thread();
  const uintptr_t stack_low =
      reinterpret_cast<uintptr_t>(current_worker->stacks.top(thread.index)) - FiberStacks::kStackBytes;
  const bool overflow = reinterpret_cast<uintptr_t>(fault.address) - stack_low < 4096;
  if (overflow)
    fail(thread, Origin::of_instruction(fault.instruction), "stack overflow: the thread uses more than %zu bytes",
         FiberStacks::kStackBytes);
  fail(thread, Origin::of_instruction(fault.instruction), "illegal memory access at %p", fault.address);
}

// Not a fiber's fault: whoever was there before decides. Modules of both builds may be loaded, each with its handler.
void pass_on(int signal_number, siginfo_t* info, void* opaque_context) {
  if (previous_action.sa_flags & SA_SIGINFO)
    previous_action.sa_sigaction(signal_number, info, opaque_context);
  else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN)
    previous_action.sa_handler(signal_number);
  else
    sigaction(signal_number, &previous_action, nullptr);  // the access faults again, by default with the process's end
}

void handle(int signal_number, siginfo_t* info, void* opaque_context) {
#if defined(__x86_64__)
  if (current_worker && current_worker->running) {
    // Goes on in report_fault when the handler returns, as if it had been called with an empty stack.
    auto* context = static_cast<ucontext_t*>(opaque_context);
    fault = {info->si_addr, reinterpret_cast<const void*>(context->uc_mcontext.gregs[REG_RIP])};
    const uintptr_t top = reinterpret_cast<uintptr_t>(current_worker->signal_stack.get()) + kSignalStackBytes / 2;
    context->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>((top & ~uintptr_t{15}) - 8);
    context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&report_fault);
    return;
  }
#endif
  pass_on(signal_number, info, opaque_context);
}

void install_handler() {
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_action);
}

}  // namespace

struct FaultsBecomeErrors::PreviousStack {
  stack_t stack;
};

FaultsBecomeErrors::FaultsBecomeErrors(Worker& worker) : previous_(new PreviousStack) {
  static std::once_flag installed;
  std::call_once(installed, install_handler);
  if (!worker.signal_stack) worker.signal_stack.reset(new unsigned char[kSignalStackBytes]);
  stack_t stack{};
  stack.ss_sp = worker.signal_stack.get();
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &previous_->stack);
}

FaultsBecomeErrors::~FaultsBecomeErrors() {
  sigaltstack(&previous_->stack, nullptr);
  delete previous_;
}

}  // namespace emulator
