// Turns a segmentation fault of a kernel into a message instead of the end of the process (Linux on x86-64;
// elsewhere the process ends). Tests put a forbidden page behind each input, so that reading past it faults.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace arimg::emulator {

struct Fault {
  pthread_t thread;
  bool armed = false, write = false;
  const void* address = nullptr;
  void (*go_on)() = nullptr;
  struct sigaction before;
  alignas(16) unsigned char stack[64 * 1024];  // of go_on: the thread's own may be what overflowed
};
inline Fault fault;

inline std::string fault_text() {
  char text[128];
  if (fault.address == nullptr)
    std::snprintf(text, sizeof text, "access to a null, misaligned or impossible address");
  else
    std::snprintf(text, sizeof text, "out of bounds: %s of address %p", fault.write ? "write" : "read",
                  fault.address);
  return text;
}

#if defined(__x86_64__) && defined(__linux__)

// Lives for a launch. A fault on this host thread makes `go_on` run, on a stack of its own; it must not
// return.
class FaultGuard {
 public:
  explicit FaultGuard(void (*go_on)()) {
    fault.thread = pthread_self();
    fault.go_on = go_on;
    stack_t stack{};
    stack.ss_sp = signal_stack_;
    stack.ss_size = sizeof signal_stack_;
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &fault.before);
    fault.armed = true;
  }
  ~FaultGuard() {
    fault.armed = false;
    sigaction(SIGSEGV, &fault.before, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  FaultGuard(const FaultGuard&) = delete;

 private:
  static void on_fault(int, siginfo_t* info, void* context) {
    if (!fault.armed || !pthread_equal(fault.thread, pthread_self())) {
      sigaction(SIGSEGV, &fault.before, nullptr);  // not ours: it faults again, for whoever was there before
      return;
    }
    auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    fault.address = info->si_code == SI_KERNEL ? nullptr : info->si_addr;
    fault.write = (registers[REG_ERR] & 2) != 0;
    registers[REG_RIP] = reinterpret_cast<greg_t>(fault.go_on);
    registers[REG_RSP] = reinterpret_cast<greg_t>(fault.stack + sizeof fault.stack - 8);
  }

  stack_t stack_before_;
  unsigned char signal_stack_[32 * 1024];
};

#else

struct FaultGuard {
  explicit FaultGuard(void (*)()) {}
};

#endif

}  // namespace arimg::emulator
