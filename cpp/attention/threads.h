// How many threads a call may use, and how many it gets.
#pragma once

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

// The threads of one parallel region, counted while it lives: of those wanted, as many as the work is worth waking and
// as calls from other host threads leave, at least one; only one in a forked child.
class Team {
 public:
  Team(int wanted, int64_t items, double flops);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

 private:
  int size_ = 1;
};

}  // namespace foveal
