// The vector vocabulary of the instruction set that this translation unit is compiled for (FOVEAL_ISA_<name>).
#pragma once

#if defined(FOVEAL_ISA_avx512bf16) || defined(FOVEAL_ISA_avx512)
#include "simd/avx512.h"
#elif defined(FOVEAL_ISA_avx2)
#include "simd/avx2.h"
#elif defined(FOVEAL_ISA_neon)
#include "simd/neon.h"
#elif defined(FOVEAL_ISA_scalar)
#include "simd/scalar.h"
#else
#error "kernels are compiled for one instruction set: define FOVEAL_ISA_<name> (cpp/isa/CMakeLists.txt)"
#endif
