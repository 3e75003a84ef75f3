// The vector vocabulary (see common.h) on NEON, as every 64-bit Arm has it: 4 floats or 2 doubles a vector. A lane of a
// mask is all ones or all zeros.
#pragma once

#include <arm_neon.h>

#include "simd/common.h"

namespace foveal {
namespace {

constexpr char kIsaName[] = "neon";
constexpr int kVectorRegisters = 32;

struct Mask32 {
  uint32x4_t v;
};
struct Mask64 {
  uint64x2_t v;
};

struct F32 {
  using T = float;
  using M = Mask32;
  static constexpr int kLanes = 4;
  float32x4_t v;
};

struct F64 {
  using T = double;
  using M = Mask64;
  static constexpr int kLanes = 2;
  float64x2_t v;
};

template <>
FOVEAL_INLINE F32 broadcast<F32>(float x) {
  return {vdupq_n_f32(x)};
}
template <>
FOVEAL_INLINE F64 broadcast<F64>(double x) {
  return {vdupq_n_f64(x)};
}

FOVEAL_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
FOVEAL_INLINE F64 load(const double* p) { return {vld1q_f64(p)}; }
FOVEAL_INLINE void store(float* p, F32 a) { vst1q_f32(p, a.v); }
FOVEAL_INLINE void store(double* p, F64 a) { vst1q_f64(p, a.v); }

FOVEAL_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
FOVEAL_INLINE F64 operator+(F64 a, F64 b) { return {vaddq_f64(a.v, b.v)}; }
FOVEAL_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
FOVEAL_INLINE F64 operator-(F64 a, F64 b) { return {vsubq_f64(a.v, b.v)}; }
FOVEAL_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
FOVEAL_INLINE F64 operator*(F64 a, F64 b) { return {vmulq_f64(a.v, b.v)}; }
FOVEAL_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
FOVEAL_INLINE F64 operator/(F64 a, F64 b) { return {vdivq_f64(a.v, b.v)}; }
FOVEAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FOVEAL_INLINE F64 fma(F64 a, F64 b, F64 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
FOVEAL_INLINE F32 max(F32 a, F32 b) { return {vmaxq_f32(a.v, b.v)}; }
FOVEAL_INLINE F64 max(F64 a, F64 b) { return {vmaxq_f64(a.v, b.v)}; }
FOVEAL_INLINE F32 min(F32 a, F32 b) { return {vminq_f32(a.v, b.v)}; }
FOVEAL_INLINE F64 min(F64 a, F64 b) { return {vminq_f64(a.v, b.v)}; }
FOVEAL_INLINE F32 abs(F32 a) { return {vabsq_f32(a.v)}; }
FOVEAL_INLINE F64 abs(F64 a) { return {vabsq_f64(a.v)}; }
FOVEAL_INLINE F32 round(F32 a) { return {vrndnq_f32(a.v)}; }
FOVEAL_INLINE F64 round(F64 a) { return {vrndnq_f64(a.v)}; }

// 2^n from its exponent field; n = -bias, the lowest let through, gives 0.
FOVEAL_INLINE F32 exp2_scale(F32 p, F32 n) {
  const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(vmaxq_f32(n.v, vdupq_n_f32(-127.0f))), vdupq_n_s32(127));
  return {vmulq_f32(p.v, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)))};
}
FOVEAL_INLINE F64 exp2_scale(F64 p, F64 n) {
  const int64x2_t biased = vaddq_s64(vcvtq_s64_f64(vmaxq_f64(n.v, vdupq_n_f64(-1023.0))), vdupq_n_s64(1023));
  return {vmulq_f64(p.v, vreinterpretq_f64_s64(vshlq_n_s64(biased, 52)))};
}

FOVEAL_INLINE F32 split(F32 a, F32& exponent) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  exponent = {vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(vshrq_n_u32(bits, 23)), vdupq_n_s32(127)))};
  const uint32x4_t mantissa = vandq_u32(bits, vdupq_n_u32(0x007fffff));
  return {vreinterpretq_f32_u32(vorrq_u32(mantissa, vdupq_n_u32(0x3f800000)))};
}
FOVEAL_INLINE F64 split(F64 a, F64& exponent) {
  const uint64x2_t bits = vreinterpretq_u64_f64(a.v);
  exponent = {vcvtq_f64_s64(vsubq_s64(vreinterpretq_s64_u64(vshrq_n_u64(bits, 52)), vdupq_n_s64(1023)))};
  const uint64x2_t mantissa = vandq_u64(bits, vdupq_n_u64(0x000fffffffffffff));
  return {vreinterpretq_f64_u64(vorrq_u64(mantissa, vdupq_n_u64(0x3ff0000000000000)))};
}

template <>
FOVEAL_INLINE Mask32 mask_from_bits<F32>(uint64_t bits) {
  const uint32x4_t lane_bit = {1, 2, 4, 8};
  return {vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), lane_bit)};
}
template <>
FOVEAL_INLINE Mask64 mask_from_bits<F64>(uint64_t bits) {
  const uint64x2_t lane_bit = {1, 2};
  return {vtstq_u64(vdupq_n_u64(bits), lane_bit)};
}
FOVEAL_INLINE Mask32 equal(F32 a, F32 b) { return {vceqq_f32(a.v, b.v)}; }
FOVEAL_INLINE Mask64 equal(F64 a, F64 b) { return {vceqq_f64(a.v, b.v)}; }
FOVEAL_INLINE Mask32 greater(F32 a, F32 b) { return {vcgtq_f32(a.v, b.v)}; }
FOVEAL_INLINE Mask64 greater(F64 a, F64 b) { return {vcgtq_f64(a.v, b.v)}; }
FOVEAL_INLINE uint64_t lane_bits(Mask32 m) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m.v, vld1q_u32(kBits)));
}
FOVEAL_INLINE uint64_t lane_bits(Mask64 m) { return (vgetq_lane_u64(m.v, 0) & 1) | (vgetq_lane_u64(m.v, 1) & 2); }
FOVEAL_INLINE F32 reciprocal(F32 a) { return {vdivq_f32(vdupq_n_f32(1), a.v)}; }
FOVEAL_INLINE F64 reciprocal(F64 a) { return {vdivq_f64(vdupq_n_f64(1), a.v)}; }
FOVEAL_INLINE F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
FOVEAL_INLINE F64 sqrt(F64 a) { return {vsqrtq_f64(a.v)}; }
FOVEAL_INLINE F32 select(Mask32 m, F32 yes, F32 no) { return {vbslq_f32(m.v, yes.v, no.v)}; }
FOVEAL_INLINE F64 select(Mask64 m, F64 yes, F64 no) { return {vbslq_f64(m.v, yes.v, no.v)}; }
FOVEAL_INLINE Mask32 sign_mask(F32 a) { return {vcltzq_s32(vreinterpretq_s32_f32(a.v))}; }
FOVEAL_INLINE Mask64 sign_mask(F64 a) { return {vcltzq_s64(vreinterpretq_s64_f64(a.v))}; }

FOVEAL_INLINE float reduce_add(F32 a) { return vaddvq_f32(a.v); }
FOVEAL_INLINE double reduce_add(F64 a) { return vaddvq_f64(a.v); }

FOVEAL_INLINE F32 widen(const float* p) { return load(p); }
FOVEAL_INLINE F64 widen(const double* p) { return load(p); }
FOVEAL_INLINE F32 widen_bf16(uint16x4_t h) { return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))}; }
FOVEAL_INLINE F32 widen_f16(uint16x4_t h) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }
FOVEAL_INLINE uint16x4_t load_halves4(const void* p, int64_t n) { return vcreate_u16(load_halves(p, n)); }
FOVEAL_INLINE F32 widen(const BFloat16* p) { return widen_bf16(load_halves4(p, 4)); }
FOVEAL_INLINE F32 widen(const Float16* p) { return widen_f16(load_halves4(p, 4)); }
FOVEAL_INLINE F32 widen_n(const float* p, int64_t n) {
  if (n >= F32::kLanes) return load(p);
  float32x4_t x = vdupq_n_f32(0);
  if (n > 0) x = vld1q_lane_f32(p, x, 0);
  if (n > 1) x = vld1q_lane_f32(p + 1, x, 1);
  if (n > 2) x = vld1q_lane_f32(p + 2, x, 2);
  return {x};
}
FOVEAL_INLINE F64 widen_n(const double* p, int64_t n) {
  if (n >= F64::kLanes) return load(p);
  return {n > 0 ? vld1q_lane_f64(p, vdupq_n_f64(0), 0) : vdupq_n_f64(0)};
}
FOVEAL_INLINE F32 widen_n(const BFloat16* p, int64_t n) { return widen_bf16(load_halves4(p, n)); }
FOVEAL_INLINE F32 widen_n(const Float16* p, int64_t n) { return widen_f16(load_halves4(p, n)); }

FOVEAL_INLINE F32 widen(const int8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
}

FOVEAL_INLINE uint16x4_t narrow_bf16(F32 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t number = vceqq_f32(a.v, a.v);
  return vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16);
}
FOVEAL_INLINE uint16x4_t narrow_f16(F32 a) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
FOVEAL_INLINE void narrow_n(float* p, F32 a, int64_t n) {
  if (n >= F32::kLanes) {
    store(p, a);
    return;
  }
  if (n > 0) vst1q_lane_f32(p, a.v, 0);
  if (n > 1) vst1q_lane_f32(p + 1, a.v, 1);
  if (n > 2) vst1q_lane_f32(p + 2, a.v, 2);
}
FOVEAL_INLINE void narrow_n(double* p, F64 a, int64_t n) {
  if (n >= F64::kLanes)
    store(p, a);
  else if (n > 0)
    vst1q_lane_f64(p, a.v, 0);
}
FOVEAL_INLINE void store_halves4(void* p, uint16x4_t x, int64_t n) {
  store_halves(p, vget_lane_u64(vreinterpret_u64_u16(x), 0), n);
}
FOVEAL_INLINE void narrow_n(BFloat16* p, F32 a, int64_t n) { store_halves4(p, narrow_bf16(a), n); }
FOVEAL_INLINE void narrow_n(Float16* p, F32 a, int64_t n) { store_halves4(p, narrow_f16(a), n); }

FOVEAL_INLINE float64x2_t as_pairs(float32x4_t a) { return vreinterpretq_f64_f32(a); }

FOVEAL_INLINE void transpose(F32 (&r)[4]) {
  const float32x4_t a = vtrn1q_f32(r[0].v, r[1].v), b = vtrn2q_f32(r[0].v, r[1].v);
  const float32x4_t c = vtrn1q_f32(r[2].v, r[3].v), d = vtrn2q_f32(r[2].v, r[3].v);
  r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(as_pairs(a), as_pairs(c)));
  r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(as_pairs(b), as_pairs(d)));
  r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(as_pairs(a), as_pairs(c)));
  r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(as_pairs(b), as_pairs(d)));
}
FOVEAL_INLINE void transpose(F64 (&r)[2]) {
  const float64x2_t a = vtrn1q_f64(r[0].v, r[1].v);
  r[1].v = vtrn2q_f64(r[0].v, r[1].v);
  r[0].v = a;
}

FOVEAL_INLINE F32 sum_each(F32 (&a)[4]) { return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))}; }
FOVEAL_INLINE F64 sum_each(F64 (&a)[2]) { return {vpaddq_f64(a[0].v, a[1].v)}; }

FOVEAL_INLINE uint64_t nonzero_bits64(const uint8_t* p) { return nonzero_bits64_portable(p); }

}  // namespace
}  // namespace foveal
