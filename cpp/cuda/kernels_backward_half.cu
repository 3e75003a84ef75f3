#define FOVEAL_CUDA_ELEMENT Half
#define FOVEAL_CUDA_FIND find_backward_half
#include "cuda/kernels_backward_16bit.inl.h"
