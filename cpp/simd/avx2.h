// The vector vocabulary (see common.h) on AVX2, FMA and F16C: 8 floats or 4 doubles a vector. In a lane mask the sign
// bit decides.
#pragma once

#include <immintrin.h>

#include "simd/common.h"

namespace foveal {
namespace {

constexpr char kIsaName[] = "avx2";
constexpr int kVectorRegisters = 16;

struct Mask32 {
  __m256 v;
};
struct Mask64 {
  __m256d v;
};

struct F32 {
  using T = float;
  using M = Mask32;
  static constexpr int kLanes = 8;
  __m256 v;
};

struct F64 {
  using T = double;
  using M = Mask64;
  static constexpr int kLanes = 4;
  __m256d v;
};

template <>
FOVEAL_INLINE F32 broadcast<F32>(float x) {
  return {_mm256_set1_ps(x)};
}
template <>
FOVEAL_INLINE F64 broadcast<F64>(double x) {
  return {_mm256_set1_pd(x)};
}

FOVEAL_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
FOVEAL_INLINE F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
FOVEAL_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
FOVEAL_INLINE void store(double* p, F64 a) { _mm256_storeu_pd(p, a.v); }

FOVEAL_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FOVEAL_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FOVEAL_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FOVEAL_INLINE F64 abs(F64 a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
FOVEAL_INLINE F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FOVEAL_INLINE F64 round(F64 a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// 2^n is made by adding n and the exponent bias to a number so large that its last bit counts ones, then shifting that
// up into the exponent field; n = -bias, the lowest let through, gives 0.
FOVEAL_INLINE F32 exp2_scale(F32 p, F32 n) {
  constexpr float kBias = 127.0f;
  const F32 biased = max(n, broadcast<F32>(-kBias)) + broadcast<F32>(0x1.8p23f + kBias);
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased.v), 23)))};
}
FOVEAL_INLINE F64 exp2_scale(F64 p, F64 n) {
  constexpr double kBias = 1023.0;
  const F64 biased = max(n, broadcast<F64>(-kBias)) + broadcast<F64>(0x1.8p52 + kBias);
  return {_mm256_mul_pd(p.v, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased.v), 52)))};
}

FOVEAL_INLINE F32 split(F32 a, F32& exponent) {
  const __m256i bits = _mm256_castps_si256(a.v);
  exponent = {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)))};
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff));
  return {_mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3f800000)))};
}
FOVEAL_INLINE F64 split(F64 a, F64& exponent) {
  const __m256i bits = _mm256_castpd_si256(a.v);
  const __m256d shifted = _mm256_or_pd(_mm256_castsi256_pd(_mm256_srli_epi64(bits, 52)), _mm256_set1_pd(0x1p52));
  exponent = {_mm256_sub_pd(shifted, _mm256_set1_pd(0x1p52 + 1023))};
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi64x(0x000fffffffffffff));
  return {_mm256_castsi256_pd(_mm256_or_si256(mantissa, _mm256_set1_epi64x(0x3ff0000000000000)))};
}

template <>
FOVEAL_INLINE Mask32 mask_from_bits<F32>(uint64_t bits) {
  const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  return {_mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), to_sign))};
}
template <>
FOVEAL_INLINE Mask64 mask_from_bits<F64>(uint64_t bits) {
  const __m256i to_sign = _mm256_setr_epi64x(63, 62, 61, 60);
  return {_mm256_castsi256_pd(_mm256_sllv_epi64(_mm256_set1_epi64x(static_cast<long long>(bits)), to_sign))};
}
FOVEAL_INLINE Mask32 equal(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FOVEAL_INLINE Mask64 equal(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
FOVEAL_INLINE Mask32 greater(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FOVEAL_INLINE Mask64 greater(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
FOVEAL_INLINE uint64_t lane_bits(Mask32 m) {
  return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(m.v)));
}
FOVEAL_INLINE uint64_t lane_bits(Mask64 m) {
  return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_pd(m.v)));
}
FOVEAL_INLINE F32 reciprocal(F32 a) {  // x / (1 - e) = x (1 + e + e^2), e^3 being below rounding
  const __m256 x = _mm256_rcp_ps(a.v), e = _mm256_fnmadd_ps(a.v, x, _mm256_set1_ps(1));
  return {_mm256_fmadd_ps(x, _mm256_fmadd_ps(e, e, e), x)};
}
FOVEAL_INLINE F64 reciprocal(F64 a) { return {_mm256_div_pd(_mm256_set1_pd(1), a.v)}; }
FOVEAL_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
FOVEAL_INLINE F64 sqrt(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
FOVEAL_INLINE F32 select(Mask32 m, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
FOVEAL_INLINE F64 select(Mask64 m, F64 yes, F64 no) { return {_mm256_blendv_pd(no.v, yes.v, m.v)}; }
FOVEAL_INLINE Mask32 sign_mask(F32 a) { return {a.v}; }
FOVEAL_INLINE Mask64 sign_mask(F64 a) { return {a.v}; }

FOVEAL_INLINE float reduce_add(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FOVEAL_INLINE double reduce_add(F64 a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}

FOVEAL_INLINE __m256i first_lanes32(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FOVEAL_INLINE __m256i first_lanes64(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FOVEAL_INLINE __m128i load_halves8(const void* p, int64_t n) {
  if (n >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  const uint64_t high = n > 4 ? load_halves(static_cast<const uint16_t*>(p) + 4, n - 4) : 0;
  return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(load_halves(p, n)));
}
FOVEAL_INLINE void store_halves8(void* p, __m128i x, int64_t n) {
  if (n >= 8) {
    _mm_storeu_si128(static_cast<__m128i*>(p), x);
    return;
  }
  store_halves(p, static_cast<uint64_t>(_mm_cvtsi128_si64(x)), n);
  if (n > 4) store_halves(static_cast<uint16_t*>(p) + 4, static_cast<uint64_t>(_mm_extract_epi64(x, 1)), n - 4);
}

FOVEAL_INLINE F32 widen(const float* p) { return load(p); }
FOVEAL_INLINE F64 widen(const double* p) { return load(p); }
FOVEAL_INLINE F32 widen_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
FOVEAL_INLINE F32 widen(const BFloat16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FOVEAL_INLINE F32 widen(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FOVEAL_INLINE F32 widen_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes32(n))}; }
FOVEAL_INLINE F64 widen_n(const double* p, int64_t n) { return {_mm256_maskload_pd(p, first_lanes64(n))}; }
FOVEAL_INLINE F32 widen_n(const BFloat16* p, int64_t n) { return widen_bf16(load_halves8(p, n)); }
FOVEAL_INLINE F32 widen_n(const Float16* p, int64_t n) { return {_mm256_cvtph_ps(load_halves8(p, n))}; }

FOVEAL_INLINE F32 widen(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

FOVEAL_INLINE __m128i narrow_bf16(F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
FOVEAL_INLINE __m128i narrow_f16(F32 a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Masked stores are slow where they are microcoded, so whole vectors go without.
FOVEAL_INLINE void narrow_n(float* p, F32 a, int64_t n) {
  if (n >= F32::kLanes)
    store(p, a);
  else
    _mm256_maskstore_ps(p, first_lanes32(n), a.v);
}
FOVEAL_INLINE void narrow_n(double* p, F64 a, int64_t n) {
  if (n >= F64::kLanes)
    store(p, a);
  else
    _mm256_maskstore_pd(p, first_lanes64(n), a.v);
}
FOVEAL_INLINE void narrow_n(BFloat16* p, F32 a, int64_t n) { store_halves8(p, narrow_bf16(a), n); }
FOVEAL_INLINE void narrow_n(Float16* p, F32 a, int64_t n) { store_halves8(p, narrow_f16(a), n); }

FOVEAL_INLINE void transpose(F32 (&r)[8]) {
  // Three rounds of interleaving: 32-bit, 64-bit, then 128-bit lanes.
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      u[i + 2 * half] = _mm256_shuffle_ps(t[i + half], t[i + half + 2], 0x44);
      u[i + 2 * half + 1] = _mm256_shuffle_ps(t[i + half], t[i + half + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

FOVEAL_INLINE void transpose(F64 (&r)[4]) {
  __m256d t[4];
  for (int i = 0; i < 4; i += 2) {
    t[i] = _mm256_unpacklo_pd(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_pd(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    r[i].v = _mm256_permute2f128_pd(t[i], t[i + 2], 0x20);
    r[i + 2].v = _mm256_permute2f128_pd(t[i], t[i + 2], 0x31);
  }
}

// Folding halves while interleaving: the vectors become half as many with every addition.
FOVEAL_INLINE F32 sum_each(F32 (&a)[8]) {
  __m256 t[4], u[2];
  for (int i = 0; i < 4; ++i)  // pairs (a0,a1): lanes 0+2, 1+3 of each half
    t[i] =
        _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm256_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  for (int i = 0; i < 2; ++i)  // halves now hold (a0,a1,a2,a3), one partial sum each
    u[i] =
        _mm256_add_ps(_mm256_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44), _mm256_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee));
  return {_mm256_add_ps(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31))};
}
FOVEAL_INLINE F64 sum_each(F64 (&a)[4]) {
  __m256d t[2];
  for (int i = 0; i < 2; ++i)
    t[i] =
        _mm256_add_pd(_mm256_unpacklo_pd(a[2 * i].v, a[2 * i + 1].v), _mm256_unpackhi_pd(a[2 * i].v, a[2 * i + 1].v));
  return {_mm256_add_pd(_mm256_permute2f128_pd(t[0], t[1], 0x20), _mm256_permute2f128_pd(t[0], t[1], 0x31))};
}

FOVEAL_INLINE uint64_t nonzero_bits64(const uint8_t* p) {
  uint64_t zeros = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + half);
    const int is_zero = _mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256()));
    zeros |= static_cast<uint64_t>(static_cast<uint32_t>(is_zero)) << (32 * half);
  }
  return ~zeros;
}

}  // namespace
}  // namespace foveal
