// Look-up of compiled kernels; one table per source file, found by the ids of kernel_list.h.
#pragma once

#include "cuda/launch.h"

namespace foveal::cuda {

struct KernelEntry {
  int id;
  Kernel kernel;
};

// Null when the id is not theirs. 16-bit kernels exist once per element, in files that define FOVEAL_CUDA_ELEMENT.
Kernel find_forward_half(int id);
Kernel find_forward_bfloat16(int id);
Kernel find_backward_half(int id);
Kernel find_backward_bfloat16(int id);
Kernel find_plain(int id);

inline Kernel find_kernel(int id, DType dtype) {
  const bool half = dtype == DType::kFloat16;
  if (const Kernel kernel = find_plain(id)) return kernel;
  if (const Kernel kernel = half ? find_forward_half(id) : find_forward_bfloat16(id)) return kernel;
  return half ? find_backward_half(id) : find_backward_bfloat16(id);
}

template <int kCount>
Kernel find_in(const KernelEntry (&table)[kCount], int id) {
  for (const KernelEntry& entry : table) {
    if (entry.id == id) return entry.kernel;
  }
  return nullptr;
}

}  // namespace foveal::cuda
