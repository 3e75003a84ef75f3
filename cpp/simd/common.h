// What every vector vocabulary shares, and the contract that each of cpp/simd/{scalar,avx2,avx512,neon}.h fulfils.
//
// All of them define the same names, and nothing else of the kernels knows an intrinsic:
//   kIsaName, kVectorRegisters
//   F32, F64          vectors of T with kLanes lanes; load and store are unaligned
//   Mask<V>           one truth value a lane; mask_from_bits takes the low kLanes bits
//   fma(a, b, c)      a * b + c; with one rounding, except where scalar.h says otherwise
//   max(a, b)         a NaN in b is returned; a NaN in a may be dropped; the same of min
//   round(a)          to the nearest integer, ties to even, for |a| < 2^22
//   exp2_scale(p, n)  p * 2^n for 1/2 <= p <= 2 (or NaN) and integral n <= 64, however negative;
//                     results below the smallest normal number may be 0, those far below are
//   split(a, e)       m in [1, 2) and integral e with a = m * 2^e, for normal a > 0
//   greater(a, b)     a > b; false where either is NaN
//   sqrt(a)           rounded once
//   reciprocal(a)     1 / a within two units in the last place, for 1 <= a < 2^64
//   lane_bits(m)      bit l = lane l of a mask
//   sign_mask(a)      lanes whose sign bit is set, -0 and -NaN included
//   reduce_add(a)     the sum of the lanes in a fixed order
//   widen, widen_n    contiguous storage -> F32 or F64: all lanes, or the first n and 0 in the others
//   widen(int8_t*)    kLanes small integers -> F32
//   narrow_n          and back, the first n lanes: float, double, Float16 (IEEE), BFloat16, rounded to
//                     nearest even; NaN stays NaN; neither touches memory past n elements
//   narrow_two        two whole vectors, one after the other
//   transpose(r)      a kLanes x kLanes block held in kLanes vectors
//   sum_each(a)       lane i = the sum of the lanes of a[i]; each sum in the same fixed order
//   nonzero_bits64    bit i = (p[i] != 0) for 64 bytes
// An n of more than kLanes counts as kLanes.
#pragma once

#include <cstdint>

#include "foveal/float16.h"

#define FOVEAL_INLINE inline __attribute__((always_inline))

namespace foveal {
namespace {

template <class V>
V broadcast(typename V::T x);  // specialised for F32 and F64

template <class V>
FOVEAL_INLINE V zero() {
  return broadcast<V>(0);
}

template <class V>
using Mask = typename V::M;

template <class V>
Mask<V> mask_from_bits(uint64_t bits);  // specialised for F32 and F64

// Where no instruction takes both at once.
template <class S, class V>
FOVEAL_INLINE void narrow_two(S* p, V first, V second) {
  narrow_n(p, first, V::kLanes);
  narrow_n(p + V::kLanes, second, V::kLanes);
}

// The first n <= 4 of some 16-bit elements, lowest first, zeros above: for instruction sets without masked 16-bit loads
// and stores.
FOVEAL_INLINE uint64_t load_halves(const void* from, int64_t n) {
  const unsigned char* p = static_cast<const unsigned char*>(from);
  uint64_t four = 0;
  if (n >= 4) {
    __builtin_memcpy(&four, p, 8);
    return four;
  }
  uint32_t two = 0;
  uint16_t one = 0;
  if (n & 1) __builtin_memcpy(&one, p + (n & 2) * 2, 2);
  if (n & 2) {
    __builtin_memcpy(&two, p, 4);
    return static_cast<uint64_t>(one) << 32 | two;
  }
  return one;
}

FOVEAL_INLINE void store_halves(void* to, uint64_t four, int64_t n) {
  unsigned char* p = static_cast<unsigned char*>(to);
  if (n >= 4) {
    __builtin_memcpy(p, &four, 8);
    return;
  }
  const uint32_t two = static_cast<uint32_t>(four);
  const uint16_t one = static_cast<uint16_t>(n & 2 ? four >> 32 : four);
  if (n & 2) __builtin_memcpy(p, &two, 4);
  if (n & 1) __builtin_memcpy(p + (n & 2) * 2, &one, 2);
}

// nonzero_bits64 in 64-bit words, eight bytes each: the top bit of a byte becomes "is not zero", and a multiplication
// gathers them.
FOVEAL_INLINE uint64_t nonzero_bits64_portable(const uint8_t* p) {
  constexpr uint64_t kLow7 = 0x7f7f7f7f7f7f7f7fu;
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    __builtin_memcpy(&x, p + 8 * i, 8);
    const uint64_t top = (((x & kLow7) + kLow7) | x) & ~kLow7;
    bits |= ((top >> 7) * 0x0102040810204080u >> 56) << (8 * i);
  }
  return bits;
}

}  // namespace
}  // namespace foveal
