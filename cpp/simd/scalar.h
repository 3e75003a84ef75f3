// The vector vocabulary (see common.h) without an instruction set: 16-byte vectors by the GCC and Clang vector
// extension, which the compiler maps to what the target's baseline has (SSE2 on x86-64) or to plain scalar code.
//
// fma(a, b, c) rounds both the product and the sum: without the instruction, a single rounding would be a call into
// libm for every lane. In a lane mask a lane is all ones or all zeros.
#pragma once

#include "simd/common.h"

namespace foveal {
namespace {

constexpr char kIsaName[] = "scalar";
constexpr int kVectorRegisters = 16;

template <class Integer>
struct LaneMask {
  typedef Integer Vector __attribute__((vector_size(16)));
  Vector v;
};

// An element type with the signed and unsigned integers of its size.
template <class Float, class Integer, class Unsigned>
struct PortableVector {
  using T = Float;
  using M = LaneMask<Integer>;
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr int kMantissaBits = sizeof(T) == 4 ? 23 : 52;
  static constexpr int kBias = sizeof(T) == 4 ? 127 : 1023;
  typedef Float Vector __attribute__((vector_size(16)));
  typedef Unsigned Bits __attribute__((vector_size(16)));
  Vector v;

  FOVEAL_INLINE Bits bits() const { return (Bits)v; }
  FOVEAL_INLINE static PortableVector from_bits(Bits bits) { return {(Vector)bits}; }
};

using F32 = PortableVector<float, int32_t, uint32_t>;
using F64 = PortableVector<double, int64_t, uint64_t>;

template <>
FOVEAL_INLINE F32 broadcast<F32>(float x) {
  return {F32::Vector{x, x, x, x}};
}
template <>
FOVEAL_INLINE F64 broadcast<F64>(double x) {
  return {F64::Vector{x, x}};
}

template <class V>
FOVEAL_INLINE V load_vector(const typename V::T* p) {
  V a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FOVEAL_INLINE F32 load(const float* p) { return load_vector<F32>(p); }
FOVEAL_INLINE F64 load(const double* p) { return load_vector<F64>(p); }
FOVEAL_INLINE void store(float* p, F32 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
FOVEAL_INLINE void store(double* p, F64 a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }

template <class... A>
using Vec = PortableVector<A...>;

template <class... A>
FOVEAL_INLINE Vec<A...> operator+(Vec<A...> a, Vec<A...> b) {
  return {a.v + b.v};
}
template <class... A>
FOVEAL_INLINE Vec<A...> operator-(Vec<A...> a, Vec<A...> b) {
  return {a.v - b.v};
}
template <class... A>
FOVEAL_INLINE Vec<A...> operator*(Vec<A...> a, Vec<A...> b) {
  return {a.v * b.v};
}
template <class... A>
FOVEAL_INLINE Vec<A...> operator/(Vec<A...> a, Vec<A...> b) {
  return {a.v / b.v};
}
template <class... A>
FOVEAL_INLINE Vec<A...> fma(Vec<A...> a, Vec<A...> b, Vec<A...> c) {
  return a * b + c;
}
template <class... A>
FOVEAL_INLINE Vec<A...> max(Vec<A...> a, Vec<A...> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class... A>
FOVEAL_INLINE Vec<A...> min(Vec<A...> a, Vec<A...> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class... A>
FOVEAL_INLINE Vec<A...> abs(Vec<A...> a) {
  return Vec<A...>::from_bits(a.bits() << 1 >> 1);
}

// A number so large that its last bit counts ones; adding it rounds.
template <class V>
constexpr typename V::T kOnesCounter = sizeof(typename V::T) == 4 ? 0x1.8p23 : 0x1.8p52;

template <class... A>
FOVEAL_INLINE Vec<A...> round(Vec<A...> a) {
  const Vec<A...> counter = broadcast<Vec<A...>>(kOnesCounter<Vec<A...>>);
  return a + counter - counter;
}

// 2^n from its exponent field; n = -bias, the lowest let through, gives 0.
template <class... A>
FOVEAL_INLINE Vec<A...> exp2_scale(Vec<A...> p, Vec<A...> n) {
  using V = Vec<A...>;
  const V biased = max(n, broadcast<V>(-V::kBias)) + broadcast<V>(kOnesCounter<V> + V::kBias);
  return p * V::from_bits(biased.bits() << V::kMantissaBits);
}

// The exponent field becomes the last bits of a large number.
template <class... A>
FOVEAL_INLINE Vec<A...> split(Vec<A...> a, Vec<A...>& exponent) {
  using V = Vec<A...>;
  constexpr typename V::T kOnes = sizeof(typename V::T) == 4 ? 0x1p23 : 0x1p52;
  exponent = V::from_bits((a.bits() >> V::kMantissaBits) | broadcast<V>(kOnes).bits()) - broadcast<V>(kOnes + V::kBias);
  return V::from_bits((a.bits() << (V::kMantissaBits == 23 ? 9 : 12) >> (V::kMantissaBits == 23 ? 9 : 12)) |
                      broadcast<V>(1).bits());
}

template <>
FOVEAL_INLINE Mask<F32> mask_from_bits<F32>(uint64_t bits) {
  const uint32_t b = static_cast<uint32_t>(bits);
  return {(F32::Bits{b, b, b, b} & F32::Bits{1, 2, 4, 8}) != 0};
}
template <>
FOVEAL_INLINE Mask<F64> mask_from_bits<F64>(uint64_t bits) {
  return {F64::M::Vector{-static_cast<int64_t>(bits & 1), -static_cast<int64_t>(bits >> 1 & 1)}};
}
template <class... A>
FOVEAL_INLINE Mask<Vec<A...>> equal(Vec<A...> a, Vec<A...> b) {
  return {a.v == b.v};
}
template <class... A>
FOVEAL_INLINE Mask<Vec<A...>> greater(Vec<A...> a, Vec<A...> b) {
  return {a.v > b.v};
}
template <class Integer>
FOVEAL_INLINE uint64_t lane_bits(LaneMask<Integer> m) {
  uint64_t bits = 0;
  for (int lane = 0; lane < static_cast<int>(16 / sizeof(Integer)); ++lane)
    bits |= static_cast<uint64_t>(m.v[lane] & 1) << lane;
  return bits;
}
template <class... A>
FOVEAL_INLINE Vec<A...> reciprocal(Vec<A...> a) {
  return broadcast<Vec<A...>>(1) / a;
}
FOVEAL_INLINE F32 sqrt(F32 a) {
  for (int lane = 0; lane < F32::kLanes; ++lane) a.v[lane] = __builtin_sqrtf(a.v[lane]);
  return a;
}
FOVEAL_INLINE F64 sqrt(F64 a) {
  for (int lane = 0; lane < F64::kLanes; ++lane) a.v[lane] = __builtin_sqrt(a.v[lane]);
  return a;
}
template <class... A>
FOVEAL_INLINE Vec<A...> select(Mask<Vec<A...>> m, Vec<A...> yes, Vec<A...> no) {
  return {m.v ? yes.v : no.v};
}
template <class... A>
FOVEAL_INLINE Mask<Vec<A...>> sign_mask(Vec<A...> a) {
  return {(typename Mask<Vec<A...>>::Vector)a.v < 0};
}

FOVEAL_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FOVEAL_INLINE double reduce_add(F64 a) { return a.v[0] + a.v[1]; }

// ---- halves, one in each 32-bit lane --------------------------------------------------------------------------------

using Bits32 = F32::Bits;

FOVEAL_INLINE Bits32 spread_halves(uint64_t four) {
  const uint32_t low = static_cast<uint32_t>(four), high = static_cast<uint32_t>(four >> 32);
  return Bits32{low, low >> 16, high, high >> 16} & 0xffff;
}
FOVEAL_INLINE uint64_t gather_halves(Bits32 x) {
  return static_cast<uint64_t>(x[0] | x[1] << 16) | static_cast<uint64_t>(x[2] | x[3] << 16) << 32;
}

FOVEAL_INLINE F32 widen_bf16(Bits32 h) { return F32::from_bits(h << 16); }

FOVEAL_INLINE Bits32 narrow_bf16(F32 a) {
  const Bits32 bits = a.bits();
  const Bits32 rounded = (bits + (bits >> 16 & 1) + 0x7fff) >> 16;
  return a.v == a.v ? rounded : Bits32{} + 0x7fc0;
}

// The exponent field moves from bias 15 to 127. Subnormals have no hidden bit: they get it, one exponent up, and lose
// it by an exact subtraction. Infinity and NaN keep an exponent of all ones.
FOVEAL_INLINE F32 widen_f16(Bits32 h) {
  const Bits32 exponent = h & 0x7c00;
  Bits32 bits = ((h & 0x7fff) << 13) + (112u << 23);
  const Bits32 subnormal = (F32::from_bits(bits + (1u << 23)) - broadcast<F32>(0x1p-14f)).bits();
  bits = exponent == 0 ? subnormal : bits;
  bits = exponent == 0x7c00 ? bits | 0x7f800000 : bits;
  return F32::from_bits(bits | (h & 0x8000) << 16);
}

// The reverse. Results below the smallest normal half are rounded by adding a float whose last bit is the last bit of a
// subnormal half; others by integer arithmetic, whose carry counts the exponent up, into infinity at the end.
FOVEAL_INLINE Bits32 narrow_f16(F32 a) {
  constexpr uint32_t kInfinity = 0x7f800000, kOverflow = 143u << 23, kSmallestNormal = 113u << 23;
  const Bits32 magnitude = a.bits() & 0x7fffffff, sign = (a.bits() ^ magnitude) >> 16;
  const Bits32 subnormal = (F32::from_bits(magnitude) + broadcast<F32>(0.5f)).bits() - (126u << 23);
  const Bits32 normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  Bits32 half = magnitude < kSmallestNormal ? subnormal : normal;
  half = magnitude >= kOverflow ? Bits32{} + 0x7c00 : half;
  half = magnitude > kInfinity ? Bits32{} + 0x7e00 : half;
  return half | sign;
}

// ---- storage --------------------------------------------------------------------------------------------------------

FOVEAL_INLINE F32 widen(const float* p) { return load(p); }
FOVEAL_INLINE F64 widen(const double* p) { return load(p); }
FOVEAL_INLINE F32 widen(const BFloat16* p) { return widen_bf16(spread_halves(load_halves(p, 4))); }
FOVEAL_INLINE F32 widen(const Float16* p) { return widen_f16(spread_halves(load_halves(p, 4))); }
FOVEAL_INLINE F32 widen_n(const float* p, int64_t n) {
  if (n >= F32::kLanes) return load(p);
  return {F32::Vector{n > 0 ? p[0] : 0, n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0}};
}
FOVEAL_INLINE F64 widen_n(const double* p, int64_t n) {
  if (n >= F64::kLanes) return load(p);
  return {F64::Vector{n > 0 ? p[0] : 0, 0}};
}
FOVEAL_INLINE F32 widen_n(const BFloat16* p, int64_t n) { return widen_bf16(spread_halves(load_halves(p, n))); }
FOVEAL_INLINE F32 widen_n(const Float16* p, int64_t n) { return widen_f16(spread_halves(load_halves(p, n))); }

FOVEAL_INLINE F32 widen(const int8_t* p) {
  return {F32::Vector{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                      static_cast<float>(p[3])}};
}

FOVEAL_INLINE void narrow_n(float* p, F32 a, int64_t n) {
  if (n >= F32::kLanes) {
    store(p, a);
    return;
  }
  if (n > 0) p[0] = a.v[0];
  if (n > 1) p[1] = a.v[1];
  if (n > 2) p[2] = a.v[2];
}
FOVEAL_INLINE void narrow_n(double* p, F64 a, int64_t n) {
  if (n >= F64::kLanes)
    store(p, a);
  else if (n > 0)
    p[0] = a.v[0];
}
FOVEAL_INLINE void narrow_n(BFloat16* p, F32 a, int64_t n) { store_halves(p, gather_halves(narrow_bf16(a)), n); }
FOVEAL_INLINE void narrow_n(Float16* p, F32 a, int64_t n) { store_halves(p, gather_halves(narrow_f16(a)), n); }

FOVEAL_INLINE F32::Vector interleave_low(F32::Vector a, F32::Vector b) { return F32::Vector{a[0], b[0], a[1], b[1]}; }
FOVEAL_INLINE F32::Vector interleave_high(F32::Vector a, F32::Vector b) { return F32::Vector{a[2], b[2], a[3], b[3]}; }

FOVEAL_INLINE void transpose(F32 (&r)[4]) {
  const F32::Vector a = interleave_low(r[0].v, r[2].v), b = interleave_low(r[1].v, r[3].v);
  const F32::Vector c = interleave_high(r[0].v, r[2].v), d = interleave_high(r[1].v, r[3].v);
  r[0].v = interleave_low(a, b);
  r[1].v = interleave_high(a, b);
  r[2].v = interleave_low(c, d);
  r[3].v = interleave_high(c, d);
}
FOVEAL_INLINE void transpose(F64 (&r)[2]) {
  const F64::Vector a = r[0].v, b = r[1].v;
  r[0].v = F64::Vector{a[0], b[0]};
  r[1].v = F64::Vector{a[1], b[1]};
}

FOVEAL_INLINE F32 sum_each(F32 (&a)[4]) {
  const F32::Vector even =
      interleave_low(a[0].v, a[2].v) + interleave_high(a[0].v, a[2].v);  // two partial sums of a0 and a2
  const F32::Vector odd = interleave_low(a[1].v, a[3].v) + interleave_high(a[1].v, a[3].v);
  return {interleave_low(even, odd) + interleave_high(even, odd)};
}
FOVEAL_INLINE F64 sum_each(F64 (&a)[2]) {
  transpose(a);
  return a[0] + a[1];
}

FOVEAL_INLINE uint64_t nonzero_bits64(const uint8_t* p) { return nonzero_bits64_portable(p); }

}  // namespace
}  // namespace foveal
