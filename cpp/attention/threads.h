// How many threads a call may use, and how many it gets.
#pragma once

#include <omp.h>
#include <setjmp.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#include "foveal/attention.h"

namespace foveal {

// The count of this process; 0 goes back to the environment. At least 0: the caller has checked.
void set_num_threads(int count);

// First that is set: set_num_threads, FOVEAL_NUM_THREADS, `framework_count` (of the framework whose arrays a call is
// about, 0: none), OpenMP's own choice, which is OMP_NUM_THREADS or the processors that the process may use. At most
// 4096, whoever asked for more. Sets `status` to kValue for a FOVEAL_NUM_THREADS that is no integer from 1 to 4096, and
// reads it again the next time.
int num_threads(int framework_count, Status& status);

// The threads of one call, counted while it lives: of those wanted, as many as the work is worth waking and as calls
// from other host threads leave, at least one; only one in a forked child. And the caller's wish to stop them.
//
// The caller is asked on its own thread in the middle of the parallel region, and may answer with anything: a Python
// signal handler that forks. In the child, none of the other threads exists, so thread 0 could wait at the end of the
// region for ever. It jumps out of it: OpenMP promises nothing about that, but a child has no team to be inconsistent
// with, and every later region of it (of another library) counts as nested in this one and so runs on one thread.
class Team {
 public:
  Team(const ExecutionOptions& options, int64_t items, double flops);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // body(thread) on every thread; 0 is the caller's. Once. What the body owns on thread 0 while it polls is not
  // destroyed in a forked child.
  template <class Body>
  Status run(const Body& body) {
    if (size_ == 1) {
      body(0);
    } else if (_setjmp(outside_) == 0) {
#pragma omp parallel num_threads(size_)
      body(omp_get_thread_num());
    } else {
      return {ErrorKind::kForked,
              "the process was forked in the middle of the call, and the threads of the call stayed with the "
              "parent; expected the child to make a call of its own"};
    }
    if (stopped()) return {ErrorKind::kInterrupted, "interrupted"};
    return {};
  }

  // Every thread waits here for the others.
  void barrier() const {
    if (size_ == 1) return;
#pragma omp barrier
  }

  // For every thread to look at between two pieces of work.
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }

  // Asks the caller, on thread 0, between two pieces of work; only now and then, since for each answer Python takes the
  // GIL, which another thread may hold for milliseconds. On other threads nothing.
  void poll(int thread);

 private:
  const ExecutionOptions& options_;
  int size_ = 1;
  bool polls_ = false;
  std::atomic<bool> stop_{false};  // relaxed: nothing is published with it
  std::chrono::steady_clock::time_point last_poll_;
  jmp_buf outside_;
};

}  // namespace foveal
