// The vector vocabulary (see common.h) on AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles a vector, lane masks in mask
// registers.
#pragma once

#include <immintrin.h>

#include "simd/common.h"

namespace foveal {
namespace {

#ifdef FOVEAL_ISA_avx512bf16
constexpr char kIsaName[] = "avx512bf16";
#else
constexpr char kIsaName[] = "avx512";
#endif
constexpr int kVectorRegisters = 32;

struct F32 {
  using T = float;
  using M = __mmask16;
  static constexpr int kLanes = 16;
  __m512 v;
};

struct F64 {
  using T = double;
  using M = __mmask8;
  static constexpr int kLanes = 8;
  __m512d v;
};

template <>
FOVEAL_INLINE F32 broadcast<F32>(float x) {
  return {_mm512_set1_ps(x)};
}
template <>
FOVEAL_INLINE F64 broadcast<F64>(double x) {
  return {_mm512_set1_pd(x)};
}

FOVEAL_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FOVEAL_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
FOVEAL_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
FOVEAL_INLINE void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }

FOVEAL_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FOVEAL_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FOVEAL_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
FOVEAL_INLINE F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
FOVEAL_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
FOVEAL_INLINE F64 abs(F64 a) { return {_mm512_abs_pd(a.v)}; }
FOVEAL_INLINE F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FOVEAL_INLINE F64 round(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
FOVEAL_INLINE F32 exp2_scale(F32 p, F32 n) { return {_mm512_scalef_ps(p.v, n.v)}; }
FOVEAL_INLINE F64 exp2_scale(F64 p, F64 n) { return {_mm512_scalef_pd(p.v, n.v)}; }

FOVEAL_INLINE F32 split(F32 a, F32& exponent) {
  exponent = {_mm512_getexp_ps(a.v)};
  return {_mm512_getmant_ps(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
}
FOVEAL_INLINE F64 split(F64 a, F64& exponent) {
  exponent = {_mm512_getexp_pd(a.v)};
  return {_mm512_getmant_pd(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src)};
}

template <>
FOVEAL_INLINE __mmask16 mask_from_bits<F32>(uint64_t bits) {
  return static_cast<__mmask16>(bits);
}
template <>
FOVEAL_INLINE __mmask8 mask_from_bits<F64>(uint64_t bits) {
  return static_cast<__mmask8>(bits);
}
FOVEAL_INLINE __mmask16 equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
FOVEAL_INLINE __mmask8 equal(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
FOVEAL_INLINE __mmask16 greater(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
FOVEAL_INLINE __mmask8 greater(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
FOVEAL_INLINE uint64_t lane_bits(__mmask16 m) { return m; }
FOVEAL_INLINE uint64_t lane_bits(__mmask8 m) { return m; }
FOVEAL_INLINE F32 reciprocal(F32 a) { return {_mm512_div_ps(_mm512_set1_ps(1), a.v)}; }
FOVEAL_INLINE F64 reciprocal(F64 a) { return {_mm512_div_pd(_mm512_set1_pd(1), a.v)}; }
FOVEAL_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
FOVEAL_INLINE F64 sqrt(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
FOVEAL_INLINE F32 select(__mmask16 m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
FOVEAL_INLINE F64 select(__mmask8 m, F64 yes, F64 no) { return {_mm512_mask_blend_pd(m, no.v, yes.v)}; }

FOVEAL_INLINE __mmask16 sign_mask(F32 a) { return _mm512_movepi32_mask(_mm512_castps_si512(a.v)); }
FOVEAL_INLINE __mmask8 sign_mask(F64 a) { return _mm512_movepi64_mask(_mm512_castpd_si512(a.v)); }

FOVEAL_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
FOVEAL_INLINE double reduce_add(F64 a) { return _mm512_reduce_add_pd(a.v); }

FOVEAL_INLINE __mmask16 first_lanes16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1); }
FOVEAL_INLINE __mmask8 first_lanes8(int64_t n) { return static_cast<__mmask8>(n >= 8 ? 0xffu : (1u << n) - 1); }

FOVEAL_INLINE F32 widen(const float* p) { return {_mm512_loadu_ps(p)}; }
FOVEAL_INLINE F64 widen(const double* p) { return {_mm512_loadu_pd(p)}; }
FOVEAL_INLINE F32 widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FOVEAL_INLINE F32 widen(const BFloat16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FOVEAL_INLINE F32 widen(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FOVEAL_INLINE F32 widen_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes16(n), p)}; }
FOVEAL_INLINE F64 widen_n(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first_lanes8(n), p)}; }
FOVEAL_INLINE F32 widen_n(const BFloat16* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes16(n), p));
}
FOVEAL_INLINE F32 widen_n(const Float16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes16(n), p))};
}

FOVEAL_INLINE F32 widen(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

FOVEAL_INLINE __m256i narrow_bf16(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
FOVEAL_INLINE __m256i narrow_f16(F32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FOVEAL_INLINE void narrow_n(float* p, F32 a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes16(n), a.v); }
FOVEAL_INLINE void narrow_n(double* p, F64 a, int64_t n) { _mm512_mask_storeu_pd(p, first_lanes8(n), a.v); }
FOVEAL_INLINE void narrow_n(BFloat16* p, F32 a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes16(n), narrow_bf16(a));
}
FOVEAL_INLINE void narrow_n(Float16* p, F32 a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes16(n), narrow_f16(a));
}

FOVEAL_INLINE void transpose(F32 (&r)[16]) {
  // Four rounds of interleaving: 32-bit, 64-bit, then 128-bit lanes twice.
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

FOVEAL_INLINE void transpose(F64 (&r)[8]) {
  __m512d t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    u[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    u[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    u[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    u[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
  }
  for (int i = 0; i < 2; ++i) {
    r[i].v = _mm512_shuffle_f64x2(u[i], u[i + 4], 0x88);
    r[i + 4].v = _mm512_shuffle_f64x2(u[i], u[i + 4], 0xdd);
    r[i + 2].v = _mm512_shuffle_f64x2(u[i + 2], u[i + 6], 0x88);
    r[i + 6].v = _mm512_shuffle_f64x2(u[i + 2], u[i + 6], 0xdd);
  }
}

// Folding halves while interleaving: 30 shuffles where a transpose and 15 additions take 64.
template <class Add>
FOVEAL_INLINE F32 fold_each(F32 (&a)[16], Add add) {
  __m512 t[8], u[4];
  for (int i = 0; i < 8; ++i)  // pairs (a0,a1): lanes 0,2 | 1,3 of each quarter
    t[i] = add(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  for (int i = 0; i < 4; ++i) {  // quarters now hold (a0,a1,a2,a3), one partial sum each
    const __m512d x = _mm512_castps_pd(t[2 * i]), y = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 v0 = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const __m512 v1 = add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return {add(_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xdd))};
}
FOVEAL_INLINE F32 sum_each(F32 (&a)[16]) {
  return fold_each(a, [](__m512 x, __m512 y) __attribute__((always_inline)) { return _mm512_add_ps(x, y); });
}
FOVEAL_INLINE F64 sum_each(F64 (&a)[8]) {
  __m512d t[4], u[2];
  for (int i = 0; i < 4; ++i)
    t[i] =
        _mm512_add_pd(_mm512_unpacklo_pd(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_pd(a[2 * i].v, a[2 * i + 1].v));
  for (int i = 0; i < 2; ++i)
    u[i] = _mm512_add_pd(_mm512_shuffle_f64x2(t[2 * i], t[2 * i + 1], 0x88),
                         _mm512_shuffle_f64x2(t[2 * i], t[2 * i + 1], 0xdd));
  return {_mm512_add_pd(_mm512_shuffle_f64x2(u[0], u[1], 0x88), _mm512_shuffle_f64x2(u[0], u[1], 0xdd))};
}

FOVEAL_INLINE uint64_t nonzero_bits64(const uint8_t* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(x, x);
}

#ifdef FOVEAL_ISA_avx512bf16
// Pairs of bfloat16 as they lie in memory, one pair a lane. Products are exact, sums round to float32; denormals count
// as 0.
#define FOVEAL_HAS_BF16_DOT 1

FOVEAL_INLINE F32 load_pairs(const BFloat16* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
FOVEAL_INLINE F32 load_pairs_n(const BFloat16* p, int64_t n) {
  const __mmask32 m = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, p))};
}
// Codes of an int8 cache: bfloat16 holds them exactly.
FOVEAL_INLINE F32 pairs_of_codes(__m256i codes) {
  const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
  const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
  return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first))};
}
FOVEAL_INLINE F32 load_pairs(const int8_t* p) {
  return pairs_of_codes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FOVEAL_INLINE F32 load_pairs_n(const int8_t* p, int64_t n) {
  const __mmask32 m = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  return pairs_of_codes(_mm256_maskz_loadu_epi8(m, p));
}
// 32 numbers, rounded to nearest even.
FOVEAL_INLINE void store_pairs(BFloat16* p, F32 first, F32 second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}
FOVEAL_INLINE void narrow_two(BFloat16* p, F32 first, F32 second) { store_pairs(p, first, second); }
// Lane l: the pair (a[l], b[l]), rounded to nearest even.
FOVEAL_INLINE F32 round_pairs(F32 a, F32 b) {
  alignas(64) static constexpr auto kOrder = [] {
    struct {
      uint16_t lane[32];
    } order = {};
    for (int x = 0; x < 32; ++x) order.lane[x] = static_cast<uint16_t>(x % 2 * 16 + x / 2);
    return order;
  }();
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder.lane), rounded))};
}
// The first and the second of each pair.
FOVEAL_INLINE void widen_pairs(F32 pairs, F32& first, F32& second) {
  const __m512i x = _mm512_castps_si512(pairs.v);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_epi32(x, _mm512_set1_epi32(-0x10000)))};
}
FOVEAL_INLINE F32 broadcast_pair(const void* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}
FOVEAL_INLINE F32 dot_bf16(F32 a, F32 b, F32 sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
}

// Of 32 elements of two rows: pairs of the same column, some columns in `lower` and the others in `upper`, in the order
// that separate_columns undoes.
FOVEAL_INLINE void interleave_pairs(F32 row0, F32 row1, F32& lower, F32& upper) {
  const __m512i a = _mm512_castps_si512(row0.v), b = _mm512_castps_si512(row1.v);
  lower = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b))};
  upper = {_mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b))};
}
FOVEAL_INLINE void separate_columns(F32 lower, F32 upper, F32& left, F32& right) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  left = {_mm512_permutex2var_ps(lower.v, first, upper.v)};
  right = {_mm512_permutex2var_ps(lower.v, second, upper.v)};
}

// Halves of 16 lanes, of which lane l belongs to row l % R of key l / R: stores the pairs (key 2x, key 2x + 1) of each
// row beside each other.
template <int R>
FOVEAL_INLINE void store_key_pairs(__m256i halves, void* p) {
  alignas(32) static constexpr auto kOrder = [] {
    struct {
      uint16_t lane[16];
    } order = {};
    for (int x = 0; x < 16; ++x) order.lane[x] = static_cast<uint16_t>((x / (2 * R) * 2 + x % 2) * R + x / 2 % R);
    return order;
  }();
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kOrder.lane));
  _mm256_store_si256(static_cast<__m256i*>(p), _mm256_permutexvar_epi16(order, halves));
}
// Rounded to nearest even.
template <int R>
FOVEAL_INLINE void store_key_pairs(F32 w, BFloat16* p) {
  store_key_pairs<R>((__m256i)_mm512_cvtneps_pbh(w.v), p);
}

// The same in integers, for codes of an int8 cache: pairs of int16, one pair a lane, exact products, and sums in int32,
// all of them as the bits of an F32. Every processor with BF16 has these instructions (VNNI) too.
FOVEAL_INLINE F32 integer_bits(__m512i x) { return {_mm512_castsi512_ps(x)}; }
FOVEAL_INLINE F32 load_code_pairs(const int8_t* p) {
  return integer_bits(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
FOVEAL_INLINE F32 load_code_pairs_n(const int8_t* p, int64_t n) {
  const __mmask32 m = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  return integer_bits(_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(m, p)));
}
FOVEAL_INLINE F32 dot_int16(F32 a, F32 b, F32 sum) {
  return integer_bits(
      _mm512_dpwssd_epi32(_mm512_castps_si512(sum.v), _mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
}
FOVEAL_INLINE F32 from_int32(F32 x) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(x.v))}; }
FOVEAL_INLINE F32 sum_each_int32(F32 (&a)[16]) {
  return fold_each(a, [](__m512 x, __m512 y) __attribute__((always_inline)) {
    return integer_bits(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y))).v;
  });
}
// To nearest even, at most 2^15 - 1 in magnitude.
FOVEAL_INLINE __m256i round_to_int16(F32 x) { return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v)); }
FOVEAL_INLINE F32 int16_pairs(F32 first, F32 second) {
  return integer_bits(_mm512_inserti64x4(_mm512_castsi256_si512(round_to_int16(first)), round_to_int16(second), 1));
}
template <int R>
FOVEAL_INLINE void store_key_pairs(F32 w, int16_t* p) {
  store_key_pairs<R>(round_to_int16(w), p);
}
#endif

}  // namespace
}  // namespace foveal
