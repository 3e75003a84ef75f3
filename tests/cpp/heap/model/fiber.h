// A computation on a stack of its own that can be suspended, copied away and put back: a backtracking search over
// thread schedules resumes the same code from the same point many times.
//
// A copy holds the used part of the stack and the registers, and goes back to the address it came from. So what the
// computation keeps must live on its stack; what it shares with others is for the search to save.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

namespace model {

class Fiber {
 public:
  struct Copy {
    jmp_buf registers;
    std::vector<char> stack;
  };

  Fiber() : stack_(new char[kStackBytes]) {}
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs body(argument) up to its first suspend(). The body must not return: it suspends for ever when done.
  void start(void (*body)(void*), void* argument) {
    body_ = body;
    argument_ = argument;
    running_ = this;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Fiber::enter, 0);
    if (_setjmp(searcher_) == 0) setcontext(&context);
  }

  // Continues after the last suspend(), up to the next.
  void resume() {
    running_ = this;
    if (_setjmp(searcher_) == 0) _longjmp(registers_, 1);
  }

  // From within the body: back to the caller of start() or resume().
  __attribute__((noinline)) static void suspend() {
    Fiber& self = *running_;
    self.low_ = static_cast<char*>(__builtin_frame_address(0)) - kFrameBytes;
    if (_setjmp(self.registers_) == 0) _longjmp(searcher_, 1);
  }

  void save(Copy& copy) const {
    std::memcpy(&copy.registers, &registers_, sizeof registers_);
    copy.stack.assign(low_, stack_.get() + kStackBytes);
  }

  void restore(const Copy& copy) {
    std::memcpy(&registers_, &copy.registers, sizeof registers_);
    low_ = stack_.get() + kStackBytes - copy.stack.size();
    std::memcpy(low_, copy.stack.data(), copy.stack.size());
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr std::ptrdiff_t kFrameBytes = 256;  // more than suspend() itself uses

  static void enter() { running_->body_(running_->argument_); }

  static inline Fiber* running_ = nullptr;
  static inline jmp_buf searcher_;

  std::unique_ptr<char[]> stack_;
  char* low_ = nullptr;  // all that is in use stands above
  jmp_buf registers_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace model
