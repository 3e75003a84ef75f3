// The forward kernels of one 16-bit element; kernels_half.cu and kernels_bfloat16.cu define ELEMENT and FIND.
#include "cuda/decode.h"
#include "cuda/forward_mma.h"
#include "cuda/kernel_list.h"
#include "cuda/kernels.h"

namespace foveal::cuda {
namespace {

// Two blocks of 4 warps or one of 8 fill the register file, at up to 255 registers a thread.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 256 / Config::kThreads)
    forward_kernel(const __grid_constant__ Params params) {
  forward_mma<Config>(params);
}
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2) decode_kernel(const __grid_constant__ Params params) {
  decode<Config>(params);
}
__global__ void __launch_bounds__(kCombineRows * 32) combine_kernel(const __grid_constant__ Params params) {
  combine_splits<FOVEAL_CUDA_ELEMENT>(params, kCombineRows);
}

const KernelEntry kTable[] = {
#define FOVEAL_ROW(id, dim, block_m, block_n, warps, policies) \
  {id, forward_kernel<ForwardConfig<FOVEAL_CUDA_ELEMENT, dim, block_m, block_n, warps, policies>>},
    FOVEAL_CUDA_FORWARD_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
#define FOVEAL_ROW(id, dim, warps, stages) {id, decode_kernel<DecodeConfig<FOVEAL_CUDA_ELEMENT, dim, warps, stages>>},
        FOVEAL_CUDA_DECODE_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
            {kCombineKernel, combine_kernel},
};

}  // namespace

Kernel FOVEAL_CUDA_FIND(int id) { return find_in(kTable, id); }

}  // namespace foveal::cuda
