// Fibers: stacks that a host thread moves between without a system call (ucontext elsewhere than x86-64).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace arimg::emulator {

#if defined(__x86_64__)

extern "C" void arimg_emulator_switch(void** save, void* load);

// Saves what the System V calling convention lets a callee keep, and goes on where `load` was saved.
asm(R"(
.text
.p2align 4
.globl arimg_emulator_switch
.hidden arimg_emulator_switch
.type arimg_emulator_switch, @function
arimg_emulator_switch:
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
.size arimg_emulator_switch, .-arimg_emulator_switch
)");

class Fiber {
 public:
  void prepare(unsigned char* stack_top, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack_top) & ~uintptr_t(15);
    auto* slot = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and no caller to return to
    for (int i = 0; i < 8; ++i) slot[i] = nullptr;
    slot[6] = reinterpret_cast<void*>(entry);
    point_ = slot;
  }
  void go_to(Fiber& next) { arimg_emulator_switch(&point_, next.point_); }

 private:
  void* point_ = nullptr;
};

#else

class Fiber {
 public:
  void prepare(unsigned char* stack_top, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_top - usable_bytes;
    context_.uc_stack.ss_size = usable_bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void go_to(Fiber& next) { swapcontext(&context_, &next.context_); }

 private:
  static constexpr size_t usable_bytes = 192 * 1024;
  ucontext_t context_;
};

#endif

// A stack with a guard page below it; tops are staggered so that frames of many fibers do not share cache
// sets.
inline unsigned char* new_stack(int number) {
  constexpr size_t bytes = 256 * 1024;
  void* base =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  mprotect(base, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
  return static_cast<unsigned char*>(base) + bytes - size_t(number % 61) * 192;
}

}  // namespace arimg::emulator
