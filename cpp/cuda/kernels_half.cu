#define FOVEAL_CUDA_ELEMENT Float16
#define FOVEAL_CUDA_FIND find_forward_half
#include "cuda/kernels_16bit.inl.h"
