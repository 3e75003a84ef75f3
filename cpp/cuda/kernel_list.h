// THE list of tensor-core kernels. plan.cc chooses from it, the .cu files instantiate it, so neither can drift.
//
// Ids are the `variant` of a launch and stay what they are. For a head-dim class and policy the first row that fits the
// device's shared memory is the default; the others are there to be measured against it.
#pragma once

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
