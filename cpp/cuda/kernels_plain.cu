#include "cuda/forward_plain.h"
#include "cuda/kernel_list.h"
#include "cuda/kernels.h"

namespace foveal::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) plain_kernel(const __grid_constant__ Params params) {
  forward_plain<Config>(params);
}

const KernelEntry kTable[] = {
#define FOVEAL_ROW(id, real, warps, rows) {id, plain_kernel<PlainConfig<real, warps, rows>>},
    FOVEAL_CUDA_PLAIN_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
};

}  // namespace

Kernel find_kernel_plain(int id) {
  for (const KernelEntry& entry : kTable) {
    if (entry.id == id) return entry.kernel;
  }
  return nullptr;
}

}  // namespace foveal::cuda
