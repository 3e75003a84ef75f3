// Look-up of compiled kernels; one table per source file, found by the ids of kernel_list.h.
#pragma once

#include "cuda/launch.h"
#include "cuda/shape.h"

namespace foveal::cuda {

struct KernelEntry {
  int id;
  Kernel kernel;
};

// 16-bit kernels exist once per element, in files compiled with FOVEAL_CUDA_ELEMENT; null when the id is not theirs.
Kernel find_kernel_half(int id);
Kernel find_kernel_bfloat16(int id);
Kernel find_kernel_plain(int id);
Kernel combine_kernel_half();
Kernel combine_kernel_bfloat16();

inline Kernel find_kernel(int id, DType dtype) {
  if (const Kernel plain = find_kernel_plain(id)) return plain;
  return dtype == DType::kFloat16 ? find_kernel_half(id) : find_kernel_bfloat16(id);
}
inline Kernel combine_kernel(DType dtype) {
  return dtype == DType::kFloat16 ? combine_kernel_half() : combine_kernel_bfloat16();
}

}  // namespace foveal::cuda
