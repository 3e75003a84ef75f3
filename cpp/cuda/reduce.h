// Reductions over a warp; every lane receives the result, in the same order of operations on every lane.
#pragma once

#include "cuda/device.h"

namespace foveal::cuda {

template <class Real>
FOVEAL_DEVICE Real warp_max(Real x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = maximum(x, shuffle_xor(x, step));
  return x;
}
template <class Real>
FOVEAL_DEVICE Real warp_sum(Real x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

}  // namespace foveal::cuda
