// The AVX-512 intrinsics that cpp/simd/avx512.h uses (F, BW, DQ, VL, BF16, VNNI), in plain C++: so that machines
// without AVX-512 test the kernels that are written for it, bit for bit.
//
// It stands in for the compiler's own header where the build has FOVEAL_EMULATE_AVX512 (docs/design.md). Every lane
// follows the operation section of Intel's Software Developer's Manual; vdpbf16ps as Intel defines it: odd element
// first, each product added by a fused multiply-add, denormals as zeros. reduce_add sums in the order of GCC's header.
#pragma once

#include <cstdint>

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef short __m256bh __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef uint8_t __mmask8;
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
typedef uint64_t __mmask64;

#define _CMP_EQ_OQ 0x00
#define _CMP_UNORD_Q 0x03
#define _CMP_GT_OQ 0x1e
#define _MM_FROUND_TO_NEAREST_INT 0x00
#define _MM_FROUND_NO_EXC 0x08

// Left to the compiler: inlined everywhere, they would make the kernels too large to compile.
#define EMULATED inline __attribute__((noinline))

namespace avx512_emulation {
namespace {

// A register as lanes of another type, and back.
template <class T, int N>
struct Lanes {
  T lane[N];
};
template <class T, class V>
EMULATED Lanes<T, static_cast<int>(sizeof(V) / sizeof(T))> lanes_of(const V& v) {
  Lanes<T, static_cast<int>(sizeof(V) / sizeof(T))> x;
  __builtin_memcpy(&x, &v, sizeof(v));
  return x;
}
template <class V, class L>
EMULATED V pack(const L& x) {
  static_assert(sizeof(V) == sizeof(L));
  V v;
  __builtin_memcpy(&v, &x, sizeof(v));
  return v;
}
// make(i) for each lane of type T.
template <class V, class T, class Make>
EMULATED V each(const Make& make) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  Lanes<T, kLanes> x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = static_cast<T>(make(i));
  return pack<V>(x);
}
template <class V, class T>
EMULATED V load_any(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
// Lanes outside the mask touch no memory.
template <class V, class T>
EMULATED V load_masked(uint64_t mask, const void* p) {
  const T* from = static_cast<const T*>(p);
  return each<V, T>([&](int i) { return mask >> i & 1 ? from[i] : T{0}; });
}
template <class T, class V>
EMULATED void store_masked(void* p, uint64_t mask, V v) {
  const auto x = lanes_of<T>(v);
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i)
    if (mask >> i & 1) static_cast<T*>(p)[i] = x.lane[i];
}

EMULATED uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
EMULATED float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Denormals count as 0, with their sign.
EMULATED float flushed(float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7f800000u) == 0 ? from_bits(bits & 0x80000000u) : x;
}
EMULATED float from_bf16(uint16_t x) { return flushed(from_bits(static_cast<uint32_t>(x) << 16)); }
EMULATED uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(flushed(x));
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7fffffffu) == 0x7f800000u) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
EMULATED int32_t to_int32(float x) {
  const float rounded = __builtin_nearbyintf(x);
  return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<int32_t>(rounded) : INT32_MIN;
}
// p * 2^floor(n) with one rounding.
EMULATED float scale_float(float p, float n) {
  if (n != n) return p + n;
  const double limited = n < -400 ? -400 : n > 400 ? 400 : __builtin_floor(n);
  return static_cast<float>(static_cast<double>(p) * __builtin_ldexp(1.0, static_cast<int>(limited)));
}
EMULATED double scale_double(double p, double n) {
  if (n != n) return p + n;
  const double limited = n < -4000 ? -4000 : n > 4000 ? 4000 : __builtin_floor(n);
  return __builtin_ldexp(p, static_cast<int>(limited));
}

// Elements of both, alternating, from the low or the high half of each 128-bit part.
template <class T, class V>
EMULATED V unpack(const V& a, const V& b, bool high) {
  constexpr int kPart = 16 / sizeof(T);
  const auto x = lanes_of<T>(a), y = lanes_of<T>(b);
  return each<V, T>([&](int i) {
    const int from = i / kPart * kPart + (high ? kPart / 2 : 0) + i % kPart / 2;
    return i % 2 == 0 ? x.lane[from] : y.lane[from];
  });
}
// 128-bit parts of a, a, b, b as imm says.
template <class V>
EMULATED V shuffle_parts(const V& a, const V& b, int imm) {
  const auto x = lanes_of<uint64_t>(a), y = lanes_of<uint64_t>(b);
  return each<V, uint64_t>([&](int i) {
    const int part = i / 2, from = (imm >> (2 * part) & 3) * 2 + i % 2;
    return part < 2 ? x.lane[from] : y.lane[from];
  });
}

}  // namespace
}  // namespace avx512_emulation

namespace {
namespace emu = avx512_emulation;

#define EMULATED_BINARY(name, V, T, expression)                  \
  EMULATED V name(V a, V b) {                                    \
    const auto x = emu::lanes_of<T>(a), y = emu::lanes_of<T>(b); \
    return emu::each<V, T>([&](int i) {                          \
      const T p = x.lane[i], q = y.lane[i];                      \
      return expression;                                         \
    });                                                          \
  }
EMULATED_BINARY(_mm512_add_ps, __m512, float, p + q)
EMULATED_BINARY(_mm512_add_pd, __m512d, double, p + q)
EMULATED_BINARY(_mm512_sub_ps, __m512, float, p - q)
EMULATED_BINARY(_mm512_sub_pd, __m512d, double, p - q)
EMULATED_BINARY(_mm512_mul_ps, __m512, float, p* q)
EMULATED_BINARY(_mm512_mul_pd, __m512d, double, p* q)
EMULATED_BINARY(_mm512_div_ps, __m512, float, p / q)
EMULATED_BINARY(_mm512_div_pd, __m512d, double, p / q)
EMULATED_BINARY(_mm512_max_ps, __m512, float, p > q ? p : q)
EMULATED_BINARY(_mm512_max_pd, __m512d, double, p > q ? p : q)
EMULATED_BINARY(_mm512_min_ps, __m512, float, p < q ? p : q)
EMULATED_BINARY(_mm512_min_pd, __m512d, double, p < q ? p : q)
EMULATED_BINARY(_mm512_add_epi32, __m512i, uint32_t, p + q)
EMULATED_BINARY(_mm512_and_epi32, __m512i, uint32_t, p& q)
#undef EMULATED_BINARY
EMULATED __m512 _mm512_sqrt_ps(__m512 a) {
  const auto x = emu::lanes_of<float>(a);
  return emu::each<__m512, float>([&](int i) { return __builtin_sqrtf(x.lane[i]); });
}
EMULATED __m512d _mm512_sqrt_pd(__m512d a) {
  const auto x = emu::lanes_of<double>(a);
  return emu::each<__m512d, double>([&](int i) { return __builtin_sqrt(x.lane[i]); });
}

// ---- constants, casts, memory
EMULATED __m512 _mm512_set1_ps(float x) {
  return emu::each<__m512, float>([&](int) { return x; });
}
EMULATED __m512d _mm512_set1_pd(double x) {
  return emu::each<__m512d, double>([&](int) { return x; });
}
EMULATED __m512i _mm512_set1_epi32(int32_t x) {
  return emu::each<__m512i, int32_t>([&](int) { return x; });
}
template <class... Int>
EMULATED __m512i _mm512_setr_epi32(Int... x) {
  const emu::Lanes<int32_t, 16> lanes = {{x...}};
  return emu::pack<__m512i>(lanes);
}
EMULATED __m512 _mm512_castpd_ps(__m512d a) { return (__m512)a; }
EMULATED __m512d _mm512_castps_pd(__m512 a) { return (__m512d)a; }
EMULATED __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
EMULATED __m512i _mm512_castpd_si512(__m512d a) { return (__m512i)a; }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m512i _mm512_castsi256_si512(__m256i a) { return __m512i{a[0], a[1], a[2], a[3], 0, 0, 0, 0}; }
EMULATED __m128i _mm256_castsi256_si128(__m256i a) { return __m128i{a[0], a[1]}; }
EMULATED __m128i _mm256_extracti128_si256(__m256i a, int part) { return __m128i{a[2 * part], a[2 * part + 1]}; }
EMULATED __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
  return half == 0 ? __m512i{b[0], b[1], b[2], b[3], a[4], a[5], a[6], a[7]}
                   : __m512i{a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
}

EMULATED __m512 _mm512_loadu_ps(const void* p) { return emu::load_any<__m512, float>(p); }
EMULATED __m512d _mm512_loadu_pd(const void* p) { return emu::load_any<__m512d, double>(p); }
EMULATED __m512i _mm512_loadu_si512(const void* p) { return emu::load_any<__m512i, int64_t>(p); }
EMULATED __m512i _mm512_load_si512(const void* p) { return emu::load_any<__m512i, int64_t>(p); }
EMULATED __m256i _mm256_loadu_si256(const __m256i* p) { return emu::load_any<__m256i, int64_t>(p); }
EMULATED __m256i _mm256_load_si256(const __m256i* p) { return emu::load_any<__m256i, int64_t>(p); }
EMULATED __m128i _mm_loadu_si128(const __m128i* p) { return emu::load_any<__m128i, int64_t>(p); }
EMULATED void _mm512_storeu_ps(void* p, __m512 a) { __builtin_memcpy(p, &a, sizeof(a)); }
EMULATED void _mm512_storeu_pd(void* p, __m512d a) { __builtin_memcpy(p, &a, sizeof(a)); }
EMULATED void _mm512_storeu_si512(void* p, __m512i a) { __builtin_memcpy(p, &a, sizeof(a)); }
EMULATED void _mm256_store_si256(__m256i* p, __m256i a) { __builtin_memcpy(p, &a, sizeof(a)); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) { return emu::load_masked<__m512, float>(m, p); }
EMULATED __m512d _mm512_maskz_loadu_pd(__mmask8 m, const void* p) { return emu::load_masked<__m512d, double>(m, p); }
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 m, const void* p) {
  return emu::load_masked<__m512i, uint16_t>(m, p);
}
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return emu::load_masked<__m256i, uint16_t>(m, p);
}
EMULATED __m256i _mm256_maskz_loadu_epi8(__mmask32 m, const void* p) {
  return emu::load_masked<__m256i, uint8_t>(m, p);
}
EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 a) { emu::store_masked<float>(p, m, a); }
EMULATED void _mm512_mask_storeu_pd(void* p, __mmask8 m, __m512d a) { emu::store_masked<double>(p, m, a); }
EMULATED void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i a) { emu::store_masked<uint16_t>(p, m, a); }

// ---- arithmetic
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emu::each<__m512, float>([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
EMULATED __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return emu::each<__m512d, double>([&](int i) { return __builtin_fma(a[i], b[i], c[i]); });
}
EMULATED __m512 _mm512_abs_ps(__m512 a) {
  return emu::each<__m512, float>([&](int i) { return __builtin_fabsf(a[i]); });
}
EMULATED __m512d _mm512_abs_pd(__m512d a) {
  return emu::each<__m512d, double>([&](int i) { return __builtin_fabs(a[i]); });
}
EMULATED __m512 _mm512_roundscale_ps(__m512 a, int) {
  return emu::each<__m512, float>([&](int i) { return __builtin_nearbyintf(a[i]); });
}
EMULATED __m512d _mm512_roundscale_pd(__m512d a, int) {
  return emu::each<__m512d, double>([&](int i) { return __builtin_nearbyint(a[i]); });
}
EMULATED __m512 _mm512_scalef_ps(__m512 p, __m512 n) {
  return emu::each<__m512, float>([&](int i) { return emu::scale_float(p[i], n[i]); });
}
EMULATED __m512d _mm512_scalef_pd(__m512d p, __m512d n) {
  return emu::each<__m512d, double>([&](int i) { return emu::scale_double(p[i], n[i]); });
}
#define _MM_MANT_NORM_1_2 0
#define _MM_MANT_SIGN_src 0
// Of normal numbers.
EMULATED __m512 _mm512_getexp_ps(__m512 a) {
  return emu::each<__m512, float>([&](int i) { return __builtin_logbf(a[i]); });
}
EMULATED __m512d _mm512_getexp_pd(__m512d a) {
  return emu::each<__m512d, double>([&](int i) { return __builtin_logb(a[i]); });
}
EMULATED __m512 _mm512_getmant_ps(__m512 a, int, int) {
  return emu::each<__m512, float>([&](int i) { return emu::scale_float(a[i], -__builtin_logbf(a[i])); });
}
EMULATED __m512d _mm512_getmant_pd(__m512d a, int, int) {
  return emu::each<__m512d, double>([&](int i) { return emu::scale_double(a[i], -__builtin_logb(a[i])); });
}
template <int kLanes, class V>
EMULATED auto emulated_reduce_add(V a) {
  auto x = emu::lanes_of<decltype(a[0] + a[0])>(a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.lane[i] = x.lane[i + half] + x.lane[i];
  return x.lane[0];
}
EMULATED float _mm512_reduce_add_ps(__m512 a) { return emulated_reduce_add<16>(a); }
EMULATED double _mm512_reduce_add_pd(__m512d a) { return emulated_reduce_add<8>(a); }
EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  const auto x = emu::lanes_of<uint32_t>(a);
  return emu::each<__m512i, uint32_t>([&](int i) { return x.lane[i] << n; });
}
EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  const auto x = emu::lanes_of<uint32_t>(a);
  return emu::each<__m512i, uint32_t>([&](int i) { return x.lane[i] >> n; });
}

// ---- masks
template <class V>
EMULATED uint64_t emulated_compare(V a, V b, int how) {
  uint64_t mask = 0;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(a[0])); ++i)
    mask |= static_cast<uint64_t>(how == _CMP_EQ_OQ   ? a[i] == b[i]
                                  : how == _CMP_GT_OQ ? a[i] > b[i]
                                                      : a[i] != a[i] || b[i] != b[i])
            << i;
  return mask;
}
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  return static_cast<__mmask16>(emulated_compare(a, b, how));
}
EMULATED __mmask8 _mm512_cmp_pd_mask(__m512d a, __m512d b, int how) {
  return static_cast<__mmask8>(emulated_compare(a, b, how));
}
EMULATED __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 a, __m512 b) {
  return emu::each<__m512, float>([&](int i) { return m >> i & 1 ? b[i] : a[i]; });
}
EMULATED __m512d _mm512_mask_blend_pd(__mmask8 m, __m512d a, __m512d b) {
  return emu::each<__m512d, double>([&](int i) { return m >> i & 1 ? b[i] : a[i]; });
}
EMULATED __m512i _mm512_mask_mov_epi32(__m512i from, __mmask16 m, __m512i a) {
  const auto x = emu::lanes_of<uint32_t>(from), y = emu::lanes_of<uint32_t>(a);
  return emu::each<__m512i, uint32_t>([&](int i) { return m >> i & 1 ? y.lane[i] : x.lane[i]; });
}
EMULATED __mmask16 _mm512_movepi32_mask(__m512i a) {
  const auto x = emu::lanes_of<int32_t>(a);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x.lane[i] < 0) << i;
  return static_cast<__mmask16>(mask);
}
EMULATED __mmask8 _mm512_movepi64_mask(__m512i a) {
  unsigned mask = 0;
  for (int i = 0; i < 8; ++i) mask |= static_cast<unsigned>(a[i] < 0) << i;
  return static_cast<__mmask8>(mask);
}
EMULATED __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
  const auto x = emu::lanes_of<uint8_t>(a), y = emu::lanes_of<uint8_t>(b);
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<uint64_t>((x.lane[i] & y.lane[i]) != 0) << i;
  return mask;
}

// ---- conversions
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
  const auto x = emu::lanes_of<int32_t>(a);
  return emu::each<__m512, float>([&](int i) { return static_cast<float>(x.lane[i]); });
}
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {
  return emu::each<__m512i, int32_t>([&](int i) { return emu::to_int32(a[i]); });
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  const auto x = emu::lanes_of<int8_t>(a);
  return emu::each<__m512i, int32_t>([&](int i) { return x.lane[i]; });
}
EMULATED __m512i _mm512_cvtepi8_epi16(__m256i a) {
  const auto x = emu::lanes_of<int8_t>(a);
  return emu::each<__m512i, int16_t>([&](int i) { return x.lane[i]; });
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const auto x = emu::lanes_of<uint16_t>(a);
  return emu::each<__m512i, uint32_t>([&](int i) { return x.lane[i]; });
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  const auto x = emu::lanes_of<uint32_t>(a);
  return emu::each<__m256i, uint16_t>([&](int i) { return x.lane[i]; });
}
EMULATED __m256i _mm512_cvtsepi32_epi16(__m512i a) {
  const auto x = emu::lanes_of<int32_t>(a);
  return emu::each<__m256i, int16_t>([&](int i) {
    return x.lane[i] > INT16_MAX ? INT16_MAX : x.lane[i] < INT16_MIN ? INT16_MIN : x.lane[i];
  });
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  const auto x = emu::lanes_of<_Float16>(a);
  return emu::each<__m512, float>([&](int i) { return static_cast<float>(x.lane[i]); });
}
EMULATED __m256i _mm512_cvtps_ph(__m512 a, int) {
  return emu::each<__m256i, _Float16>([&](int i) { return static_cast<_Float16>(a[i]); });
}
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return emu::each<__m256bh, uint16_t>([&](int i) { return emu::to_bf16(a[i]); });
}
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return emu::each<__m512bh, uint16_t>([&](int i) { return emu::to_bf16(i < 16 ? low[i] : high[i - 16]); });
}

// ---- products of pairs
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = emu::lanes_of<uint16_t>(a), y = emu::lanes_of<uint16_t>(b);
  return emu::each<__m512, float>([&](int i) {
    float t = emu::flushed(sum[i]);
    for (int e = 2 * i + 1; e >= 2 * i; --e)
      t = emu::flushed(__builtin_fmaf(emu::from_bf16(x.lane[e]), emu::from_bf16(y.lane[e]), t));
    return t;
  });
}
EMULATED __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto s = emu::lanes_of<uint32_t>(sum);
  const auto x = emu::lanes_of<int16_t>(a), y = emu::lanes_of<int16_t>(b);
  return emu::each<__m512i, uint32_t>([&](int i) {
    return s.lane[i] + static_cast<uint32_t>(x.lane[2 * i] * y.lane[2 * i]) +
           static_cast<uint32_t>(x.lane[2 * i + 1] * y.lane[2 * i + 1]);
  });
}

// ---- lanes elsewhere
EMULATED __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return emu::unpack<uint32_t>(a, b, false); }
EMULATED __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return emu::unpack<uint32_t>(a, b, true); }
EMULATED __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return emu::unpack<uint64_t>(a, b, false); }
EMULATED __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return emu::unpack<uint64_t>(a, b, true); }
EMULATED __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return emu::unpack<uint16_t>(a, b, false); }
EMULATED __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return emu::unpack<uint16_t>(a, b, true); }
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int imm) { return emu::shuffle_parts(a, b, imm); }
EMULATED __m512d _mm512_shuffle_f64x2(__m512d a, __m512d b, int imm) { return emu::shuffle_parts(a, b, imm); }
EMULATED __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
  const auto o = emu::lanes_of<uint16_t>(order), x = emu::lanes_of<uint16_t>(a);
  return emu::each<__m512i, uint16_t>([&](int i) { return x.lane[o.lane[i] & 31]; });
}
EMULATED __m256i _mm256_permutexvar_epi16(__m256i order, __m256i a) {
  const auto o = emu::lanes_of<uint16_t>(order), x = emu::lanes_of<uint16_t>(a);
  return emu::each<__m256i, uint16_t>([&](int i) { return x.lane[o.lane[i] & 15]; });
}
EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i order, __m512 b) {
  const auto o = emu::lanes_of<uint32_t>(order), x = emu::lanes_of<uint32_t>(a), y = emu::lanes_of<uint32_t>(b);
  return emu::each<__m512, uint32_t>(
      [&](int i) { return o.lane[i] & 16 ? y.lane[o.lane[i] & 15] : x.lane[o.lane[i] & 15]; });
}

}  // namespace
