#define FOVEAL_CUDA_ELEMENT Half
#define FOVEAL_CUDA_FIND find_kernel_half
#define FOVEAL_CUDA_COMBINE combine_kernel_half
#include "cuda/kernels_16bit.inl.h"
