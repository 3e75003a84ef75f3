#include "cuda/backward_bias.h"
#include "cuda/backward_plain.h"
#include "cuda/backward_rows.h"
#include "cuda/forward_plain.h"
#include "cuda/kernel_list.h"
#include "cuda/kernels.h"

namespace foveal::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) plain_kernel(const __grid_constant__ Params params) {
  forward_plain<Config>(params);
}

template <class Config, bool kOwnsKeys>
__global__ void __launch_bounds__(Config::kThreads, 1) plain_backward_kernel(const __grid_constant__ Params params) {
  backward_plain<Config, kOwnsKeys>(params);
}
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) plain_bias_kernel(const __grid_constant__ Params params) {
  differentiate_bias<Config>(params);
}
template <class Real>
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows_kernel(const __grid_constant__ Params params) {
  prepare_rows<Real>(params);
}
template <class Real>
__global__ void __launch_bounds__(kSinkThreads) plain_sinks_kernel(const __grid_constant__ Params params) {
  differentiate_sinks<Real>(params);
}

const KernelEntry kTable[] = {
#define FOVEAL_ROW(id, real, warps, rows) {id, plain_kernel<PlainConfig<real, warps, rows>>},
    FOVEAL_CUDA_PLAIN_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
#define FOVEAL_ROW(id, real, warps, rows)                                                \
  {id + kPrepareRows, prepare_rows_kernel<real>},                                        \
      {id + kPlainRows, plain_backward_kernel<PlainConfig<real, warps, rows>, false>},   \
      {id + kPlainKeyRows, plain_backward_kernel<PlainConfig<real, warps, rows>, true>}, \
      {id + kPlainBias, plain_bias_kernel<PlainConfig<real, warps, rows>>},              \
      {id + kPlainSinks, plain_sinks_kernel<real>},
        FOVEAL_CUDA_PLAIN_BACKWARD_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
};

}  // namespace

Kernel find_plain(int id) { return find_in(kTable, id); }

}  // namespace foveal::cuda
