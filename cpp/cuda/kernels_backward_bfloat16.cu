#define FOVEAL_CUDA_ELEMENT BFloat16
#define FOVEAL_CUDA_FIND find_backward_bfloat16
#include "cuda/kernels_backward_16bit.inl.h"
