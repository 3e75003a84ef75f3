// Reading and writing rows of stored elements (float, double, Float16, BFloat16, and codes of an int8 cache) as
// accumulator values, at any stride.
#pragma once

#include "kernels/mask.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// The first n <= kLanes small integers.
FOVEAL_INLINE F32 widen_n(const int8_t* p, int64_t n) {
  int8_t codes[F32::kLanes] = {};
  for (int64_t x = 0; x < n && x < F32::kLanes; ++x) codes[x] = p[x];
  return widen(codes);
}

template <class V, class S>
FOVEAL_INLINE typename V::T widen_one(const S* p) {
  if constexpr (sizeof(S) == sizeof(typename V::T)) {
    return *p;
  } else {
    alignas(64) typename V::T lanes[V::kLanes];
    store(lanes, widen_n(p, 1));
    return lanes[0];
  }
}

// n <= kLanes elements of a row, the other lanes 0.
template <class V, class S>
FOVEAL_INLINE V widen_strided(const S* p, int64_t stride, int64_t n) {
  if (stride == 1) return n >= V::kLanes ? widen(p) : widen_n(p, n);
  alignas(64) typename V::T lanes[V::kLanes] = {};
  for (int64_t c = 0; c < n && c < V::kLanes; ++c) lanes[c] = widen_one<V>(p + c * stride);
  return load(lanes);
}

// Row j begins at p + j * stride, or at at[j] where the rows are scattered; its elements are contiguous.
template <class S>
struct Rows {
  const S* p;
  int64_t stride;
  const S* const* at = nullptr;

  FOVEAL_INLINE const S* row(int64_t j) const { return at != nullptr ? at[j] : p + j * stride; }
};

// Rows of S as dense rows of `To`, which is S or the accumulator type.
template <class V, class To, class S>
static void pack_rows(const S* src, int64_t stride_s, int64_t stride_d, int64_t rows, int64_t width, To* dst) {
  for (int64_t j = 0; j < rows; ++j, src += stride_s, dst += width) {
    if constexpr (__is_same(To, S)) {
      for (int64_t c = 0; c < width; ++c) dst[c] = src[c * stride_d];
    } else {
      int64_t c = 0;
      if (stride_d == 1)
        for (; c + V::kLanes <= width; c += V::kLanes) store(dst + c, widen(src + c));
      for (; c < width; c += V::kLanes) {
        const int64_t n = min64(V::kLanes, width - c);
        narrow_n(dst + c, widen_strided<V>(src + c * stride_d, stride_d, n), n);
      }
    }
  }
}

// In place where they are stored so, else packed into `buffer`.
template <class V, class To, class S>
static Rows<To> rows_as(const S* src, int64_t stride_s, int64_t stride_d, int64_t rows, int64_t width, To* buffer) {
  if constexpr (__is_same(To, S))
    if (stride_d == 1) return {src, stride_s};
  pack_rows<V>(src, stride_s, stride_d, rows, width, buffer);
  return {buffer, width};
}

template <class V, class S>
FOVEAL_INLINE void narrow_strided(S* p, int64_t stride, V x, int64_t n) {
  if (stride == 1) {
    narrow_n(p, x, n);
    return;
  }
  S lanes[V::kLanes];
  narrow_n(lanes, x, V::kLanes);
  for (int64_t c = 0; c < n && c < V::kLanes; ++c) p[c * stride] = lanes[c];
}

// Whether no element of a (rows, width) block with contiguous rows is inf or NaN.
template <class V, class S>
static bool all_finite(const Rows<S>& x, int64_t rows, int64_t width) {
  V probe = zero<V>();  // becomes NaN where an element is inf or NaN
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t c = 0; c < width; c += V::kLanes)
      probe = fma(widen_strided<V>(x.row(j) + c, 1, min64(V::kLanes, width - c)), zero<V>(), probe);
  return reduce_add(probe) == 0;
}

template <class V, class S>
static bool all_finite(const S* p, int64_t stride_s, int64_t rows, int64_t width) {
  return all_finite<V>(Rows<S>{p, stride_s}, rows, width);
}

// A double in the accumulator type; what is finite stays so.
template <class T>
FOVEAL_INLINE T narrow_finite(double x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x;
  } else {
    constexpr double kMost = __FLT_MAX__;
    if (__builtin_fabs(x) == __builtin_inf()) return static_cast<T>(x);
    return static_cast<T>(x > kMost ? kMost : x < -kMost ? -kMost : x);
  }
}

// n <= kLanes elements of any floating dtype at `p + offset`.
template <class V>
static V widen_any(const void* p, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  using T = typename V::T;
  alignas(64) T lanes[V::kLanes] = {};
  switch (dtype) {
    case DType::kFloat32: {
      const float* x = static_cast<const float*>(p) + offset;
      if constexpr (sizeof(T) == 4) return widen_strided<V>(x, stride, n);
      for (int64_t c = 0; c < n; ++c) lanes[c] = static_cast<T>(x[c * stride]);
      break;
    }
    case DType::kFloat64: {
      const double* x = static_cast<const double*>(p) + offset;
      if constexpr (sizeof(T) == 8) return widen_strided<V>(x, stride, n);
      for (int64_t c = 0; c < n; ++c) lanes[c] = narrow_finite<T>(x[c * stride]);
      break;
    }
    case DType::kFloat16: {
      const Float16* x = static_cast<const Float16*>(p) + offset;
      if constexpr (sizeof(T) == 4) return widen_strided<V>(x, stride, n);
      for (int64_t c = 0; c < n; ++c) lanes[c] = static_cast<T>(widen_one<F32>(x + c * stride));
      break;
    }
    case DType::kBFloat16: {
      const BFloat16* x = static_cast<const BFloat16*>(p) + offset;
      if constexpr (sizeof(T) == 4) return widen_strided<V>(x, stride, n);
      for (int64_t c = 0; c < n; ++c) lanes[c] = static_cast<T>(widen_one<F32>(x + c * stride));
      break;
    }
    default:
      break;
  }
  return load(lanes);
}

}  // namespace
}  // namespace foveal
