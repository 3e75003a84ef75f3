// What this machine can do at most: the yardsticks beside which the benchmarks print their results.
#pragma once

#include <cstdint>

namespace foveal {

// Float32 operations per second of fused multiply-adds in registers, on `threads` threads at once, with the widest
// vectors that the processor has; an addition and a multiplication count as two. The best round within `seconds`.
double measure_fma_peak(int threads, double seconds);

// Bytes per second at which `threads` threads read a buffer of `nbytes`, front to back, each its own part. The best of
// several passes. Throws std::bad_alloc.
double measure_read_bandwidth(int threads, int64_t nbytes);

}  // namespace foveal
