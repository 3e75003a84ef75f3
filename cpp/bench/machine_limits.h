// What this machine can do at most: work that is bound by one limit of it alone, to be timed beside our own.
#pragma once

#include <cstdint>

namespace foveal {

// About so many float32 operations as fused multiply-adds in registers, shared by `threads` threads, with the widest
// vectors that the processor has; an addition and a multiplication count as two. Returns how many it were.
double run_fmas(int threads, double operations);

// Loads every byte once, front to back, each of `threads` threads its own part.
void read_bytes(int threads, const void* data, int64_t nbytes);

}  // namespace foveal
