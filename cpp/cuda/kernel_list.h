// THE list of tensor-core kernels. plan.cc chooses from it, the .cu files instantiate it, so neither can drift.
//
// Ids are the `variant` of a launch and stay what they are. For a head-dim class and policy the first row that fits the
// device's shared memory is the default; the others are there to be measured against it.
#pragma once

#include "cuda/shape.h"

// id, head-dim class, block_m, block_n, warps, policies
#define FOVEAL_CUDA_FORWARD_KERNELS(X) \
  X(0, 64, 128, 64, 4, false)          \
  X(1, 64, 64, 64, 4, false)           \
  X(2, 128, 128, 32, 4, false)         \
  X(3, 128, 64, 64, 4, false)          \
  X(4, 128, 128, 64, 8, false)         \
  X(5, 256, 128, 64, 8, false)         \
  X(6, 256, 64, 32, 4, false)          \
  X(20, 64, 64, 64, 4, true)           \
  X(21, 128, 64, 64, 4, true)          \
  X(22, 256, 64, 32, 4, true)

// id, head-dim class, warps, stages. Stages change no bit of the result.
#define FOVEAL_CUDA_DECODE_KERNELS(X) \
  X(40, 64, 4, 3)                     \
  X(41, 64, 4, 5)                     \
  X(42, 128, 4, 3)                    \
  X(43, 128, 4, 2)                    \
  X(44, 256, 2, 3)                    \
  X(45, 256, 2, 2)

// id, accumulator, warps, rows per warp
#define FOVEAL_CUDA_PLAIN_KERNELS(X) \
  X(60, float, 8, 4)                 \
  X(61, double, 4, 4)

// id, head-dim class, owns keys (dk, dv) or rows (dq), m tiles a warp, walked rows, warps, column parts
#define FOVEAL_CUDA_BACKWARD_KERNELS(X) \
  X(80, 64, false, 2, 32, 4, 1)         \
  X(83, 64, false, 1, 64, 8, 1)         \
  X(81, 128, false, 1, 32, 8, 1)        \
  X(84, 128, false, 1, 64, 4, 1)        \
  X(82, 256, false, 1, 16, 4, 1)        \
  X(90, 64, true, 1, 64, 8, 1)          \
  X(93, 64, true, 2, 16, 4, 1)          \
  X(91, 128, true, 1, 32, 4, 1)         \
  X(94, 128, true, 1, 32, 8, 1)         \
  X(92, 256, true, 1, 16, 8, 2)

// first id, accumulator, warps, rows per warp; five kernels each, in the order of PlainBackward
#define FOVEAL_CUDA_PLAIN_BACKWARD_KERNELS(X)      \
  X(100, float, 8, kPlainBackwardRowsPerWarpFloat) \
  X(105, double, 4, kPlainBackwardRowsPerWarpDouble)

namespace foveal::cuda {

constexpr int kCombineKernel = 50;  // the merge of split keys

enum PlainBackward { kPrepareRows, kPlainRows, kPlainKeyRows, kPlainBias, kPlainSinks };

}  // namespace foveal::cuda
