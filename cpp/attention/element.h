// One array element of any floating dtype as a double, and back with a single rounding (to nearest, ties to even).
//
// For code that must be plainly right rather than fast: the oracle, the tests, and the small arrays of a problem
// (lengths, slopes, sinks). Kernels have vector conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "foveal/tensor_view.h"

namespace foveal {

// A binary16-like format: sign, exponent, `kMantissaBits` bits, subnormals, infinities (IEEE 754-2019, 3.4).
template <int kExponentBits, int kMantissaBits>
struct SmallFloat {
  static constexpr int kMaxBiased = (1 << kExponentBits) - 1;
  static constexpr int kMinExponent = 2 - (1 << (kExponentBits - 1));  // of the smallest normal number
  static constexpr int kSignBit = 1 << (kExponentBits + kMantissaBits);

  static double decode(uint16_t bits) {
    const int biased = (bits >> kMantissaBits) & kMaxBiased;
    const int mantissa = bits & ((1 << kMantissaBits) - 1);
    double magnitude;
    if (biased == kMaxBiased) {
      magnitude = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    } else if (biased == 0) {
      magnitude = std::ldexp(mantissa, kMinExponent - kMantissaBits);
    } else {
      magnitude = std::ldexp(mantissa + (1 << kMantissaBits), kMinExponent + biased - 1 - kMantissaBits);
    }
    return (bits & kSignBit) != 0 ? -magnitude : magnitude;
  }

  static uint16_t encode(double value) {
    constexpr int kInfinity = kMaxBiased << kMantissaBits;
    const int sign = std::signbit(value) ? kSignBit : 0;
    if (std::isnan(value)) return static_cast<uint16_t>(sign | kInfinity | (1 << (kMantissaBits - 1)));
    const double magnitude = std::fabs(value);
    if (magnitude == 0.0) return static_cast<uint16_t>(sign);
    if (std::isinf(magnitude) || std::ilogb(magnitude) > kMinExponent + kMaxBiased)
      return static_cast<uint16_t>(sign | kInfinity);
    const int exponent = std::max(std::ilogb(magnitude), kMinExponent);
    // The significand in units of its last bit, hidden bit included: that bit, and a carry out of the rounding, count
    // the exponent field up by themselves, from 0 (subnormal) to the infinity.
    const int significand = static_cast<int>(std::nearbyint(std::ldexp(magnitude, kMantissaBits - exponent)));
    const int bits = ((exponent - kMinExponent) << kMantissaBits) + significand;
    return static_cast<uint16_t>(sign | (bits < kInfinity ? bits : kInfinity));
  }
};

using Float16Format = SmallFloat<5, 10>;
using BFloat16Format = SmallFloat<8, 7>;

inline double load_element(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(view.data)[offset];
    case DType::kFloat64:
      return static_cast<const double*>(view.data)[offset];
    case DType::kFloat16:
      return Float16Format::decode(static_cast<const uint16_t*>(view.data)[offset]);
    case DType::kBFloat16:
      return BFloat16Format::decode(static_cast<const uint16_t*>(view.data)[offset]);
    default:
      return std::numeric_limits<double>::quiet_NaN();
  }
}

inline void store_element(const TensorView& view, int64_t offset, double value) {
  switch (view.dtype) {
    case DType::kFloat32:
      static_cast<float*>(view.data)[offset] = static_cast<float>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(view.data)[offset] = value;
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(view.data)[offset] = Float16Format::encode(value);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(view.data)[offset] = BFloat16Format::encode(value);
      break;
    default:
      break;
  }
}

// The int32 or int64 at this offset.
inline int64_t integer_at(const TensorView& view, int64_t offset) {
  return view.dtype == DType::kInt32 ? static_cast<const int32_t*>(view.data)[offset]
                                     : static_cast<const int64_t*>(view.data)[offset];
}

// Element i of a rank-1 int32 or int64 view.
inline int64_t load_integer(const TensorView& view, int64_t i) { return integer_at(view, i * view.stride[0]); }

}  // namespace foveal
