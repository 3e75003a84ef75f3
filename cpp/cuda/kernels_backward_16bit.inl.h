// The backward kernels of one 16-bit element; kernels_backward_half.cu and kernels_backward_bfloat16.cu define ELEMENT
// and FIND.
#include "cuda/backward_mma.h"
#include "cuda/kernel_list.h"
#include "cuda/kernels.h"

namespace foveal::cuda {
namespace {

// Up to 255 registers a thread.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 256 / Config::kThreads)
    backward_kernel(const __grid_constant__ Params params) {
  backward_mma<Config>(params);
}

const KernelEntry kTable[] = {
#define FOVEAL_ROW(id, dim, owns_keys, m_tiles, walked, warps, parts) \
  {id, backward_kernel<BackwardConfig<FOVEAL_CUDA_ELEMENT, dim, owns_keys, m_tiles, walked, warps, parts>>},
    FOVEAL_CUDA_BACKWARD_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
};

}  // namespace

Kernel FOVEAL_CUDA_FIND(int id) { return find_in(kTable, id); }

}  // namespace foveal::cuda
