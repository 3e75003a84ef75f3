// Single elements of a TensorView by value, whatever its dtype: for the small arrays (lengths, slopes, sinks) and the oracle.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "foveal/tensor_view.h"

namespace foveal {

inline double half_to_double(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, fraction = bits & 1023;
  double x = 0;
  if (exponent == 31) {
    x = fraction != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    x = std::ldexp(fraction, -24);
  } else {
    x = std::ldexp(1024 + fraction, exponent - 25);
  }
  return sign != 0 ? -x : x;
}

inline double read_floating(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(view.data)[offset];
    case DType::kFloat64:
      return static_cast<const double*>(view.data)[offset];
    case DType::kFloat16:
      return half_to_double(static_cast<const uint16_t*>(view.data)[offset]);
    case DType::kBFloat16:
      return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(view.data)[offset]) << 16);
    default:
      return NAN;
  }
}

// Element i of a rank-1 integer view.
inline int64_t read_integer(const TensorView& view, int64_t i) {
  const int64_t offset = i * view.stride[0];
  return view.dtype == DType::kInt32 ? static_cast<const int32_t*>(view.data)[offset]
                                     : static_cast<const int64_t*>(view.data)[offset];
}

}  // namespace foveal
