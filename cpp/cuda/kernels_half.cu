#define FOVEAL_CUDA_ELEMENT Half
#define FOVEAL_CUDA_FIND find_forward_half
#include "cuda/kernels_16bit.inl.h"
