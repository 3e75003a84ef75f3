// Scores in base 2: kernels multiply by log2 e once, on the queries, so that every weight is a power of two.
#pragma once

#include "simd/vectors.h"

namespace foveal {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The largest finite score (in base 2): so little below the largest number that scores of an ordinary size may still be
// added to it.
template <class T>
constexpr T kHighestScore =
    static_cast<T>(0.999998) * (sizeof(T) == 4 ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__));

template <class V>
FOVEAL_INLINE V negative_infinity() {
  return broadcast<V>(-static_cast<typename V::T>(__builtin_inf()));
}

}  // namespace
}  // namespace foveal
