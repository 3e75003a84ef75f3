#define FOVEAL_CUDA_ELEMENT Float16
#define FOVEAL_CUDA_FIND find_backward_half
#include "cuda/kernels_backward_16bit.inl.h"
