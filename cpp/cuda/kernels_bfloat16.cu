#define FOVEAL_CUDA_ELEMENT BFloat16
#define FOVEAL_CUDA_FIND find_forward_bfloat16
#include "cuda/kernels_16bit.inl.h"
