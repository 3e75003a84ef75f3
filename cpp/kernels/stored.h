// What keys and values of a cache may be stored as, beside the queries' own type: one traits struct a type.
//
// The element is  code * scale, with a scale for each page and head. Kernels widen codes by the vector vocabulary
// (widen, widen_n); the cache's writer encodes with this header's function. Both include it, so it stays free of the
// standard library (kernels/kernel_table.cc says why).
#pragma once

#include <cstdint>

#include "foveal/tensor_view.h"

namespace foveal {
namespace {

// Elements of the queries' type, read as they are.
template <class C>
struct Stored {
  static constexpr bool kScaled = false;  // elements are codes, and pages have scales
  static constexpr bool kFinite = false;  // no element is inf or NaN
};

template <>
struct Stored<int8_t> {
  static constexpr bool kScaled = true;
  static constexpr bool kFinite = true;

  // To the nearest step, at most 127 of them; 0 where there is no scale, and for NaN.
  static int8_t encode(double x, double scale) {
    if (!(scale > 0) || x != x) return 0;
    const double steps = __builtin_nearbyint(x / scale);
    return static_cast<int8_t>(steps > 127.0 ? 127.0 : steps < -127.0 ? -127.0 : steps);
  }
};

// Calls visit(pointer to C) with the type that keys and values of `dtype` are stored as, under queries of S.
template <class V, class S, class Visit>
inline __attribute__((always_inline)) void with_stored(DType dtype, const Visit& visit) {
  if constexpr (sizeof(typename V::T) == sizeof(float))  // there are no codes under float64
    if (dtype == DType::kInt8) return visit(static_cast<const int8_t*>(nullptr));
  visit(static_cast<const S*>(nullptr));
}

}  // namespace
}  // namespace foveal
