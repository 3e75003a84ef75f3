// An int8 cache under grouped bfloat16 queries, in integers: with four rows a head or more, widening every code costs
// as much as all products, and an instruction that multiplies pairs of int16 takes codes after one sign extension.
//
// A query becomes 16-bit steps of its largest feature, the weights of a row those of its largest weight in the block
// (its scales are in it already). Products and sums are exact in int32, and become float32 at the end of the block.
// With u = 2^-16,
//   a score is off by at most             u * max|q| * sum_d |k_d|, beside its one rounding
//   an element of a block's sum by        u * kKeyBlock * max w * max|v| = 2^-9 max w max|v|
// both below what reading bfloat16 instead would cost (docs/numerics.md).
#pragma once

#include "kernels/arena.inl.h"
#include "kernels/decode_products.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/storage.inl.h"
#include "kernels/value_pairs.inl.h"
#include "simd/vectors.h"

#ifdef FOVEAL_HAS_BF16_DOT

namespace foveal {
namespace {

constexpr int64_t kLargestCode = 128;  // in magnitude

// Steps so that `largest` (finite, at least 0) is `steps` of them. NaN where `probe` is: the sum of all x * 0.
struct Step {
  float size, inverse;

  Step(float largest, float probe, float steps) {
    // Below it, everything counts as zero, and the inverse would not be finite.
    const bool any = largest > 0x1p-100f;
    size = (any ? largest / steps : 0) + probe;
    inverse = any ? steps / largest : 0;
  }
};

struct CodeDot {
  static constexpr int kChunk = 2 * F32::kLanes;

  FOVEAL_INLINE static F32 multiply_add(F32 a, F32 b, F32 sum) { return dot_int16(a, b, sum); }
  FOVEAL_INLINE static F32 load_chunk(const int8_t* k) { return load_code_pairs(k); }
  FOVEAL_INLINE static F32 load_chunk_n(const int8_t* k, int64_t n) { return load_code_pairs_n(k, n); }
  FOVEAL_INLINE static F32 sum_each(F32 (&sums)[F32::kLanes]) { return sum_each_int32(sums); }
  FOVEAL_INLINE static F32 finish(F32 sum, F32 unit) { return from_int32(sum) * unit; }

  static float load_row(const BFloat16* q, int64_t stride, int64_t n, F32 scale, float* to) {
    F32 largest = zero<F32>(), probe = zero<F32>();
    for (int64_t d = 0; d < n; d += F32::kLanes) {
      const F32 x = widen_strided<F32>(q + d * stride, stride, n - d);
      largest = max(largest, abs(x));
      probe = fma(x, zero<F32>(), probe);
    }
    alignas(64) float lanes[F32::kLanes];
    store(lanes, largest);
    for (int lane = 1; lane < F32::kLanes; ++lane) lanes[0] = lanes[lane] > lanes[0] ? lanes[lane] : lanes[0];
    // The sum over n products stays in int32.
    const int64_t room = INT32_MAX / (kLargestCode * max64(n, 1));
    const Step step(lanes[0], reduce_add(probe), static_cast<float>(min64(INT16_MAX, room)));
    const F32 inverse = broadcast<F32>(step.inverse);
    for (int64_t d = 0; d < n; d += kChunk, to += F32::kLanes) {
      const int64_t rest = n - d - F32::kLanes;
      const F32 first = widen_strided<F32>(q + d * stride, stride, n - d);
      const F32 second = rest > 0 ? widen_strided<F32>(q + (d + F32::kLanes) * stride, stride, rest) : zero<F32>();
      store(to, int16_pairs(first * inverse, second * inverse));
    }
    alignas(64) float scales[F32::kLanes];
    store(scales, scale);
    return scales[0] * step.size;
  }
};

struct CodePairs {
  using Weight = int16_t;

  FOVEAL_INLINE static F32 load(const int8_t* p) { return load_code_pairs(p); }
  FOVEAL_INLINE static F32 load_n(const int8_t* p, int64_t n) { return load_code_pairs_n(p, n); }
  FOVEAL_INLINE static F32 dot(F32 values, F32 weights, F32 sum) { return dot_int16(values, weights, sum); }
  FOVEAL_INLINE static F32 finish(F32 sum, float unit) { return from_int32(sum) * broadcast<F32>(unit); }

  template <int R>
  static void round_weights(const float* p, int64_t n, int16_t* weights, float (&unit)[R]) {
    static_assert(kKeyBlock * kLargestCode * INT16_MAX <= INT32_MAX);
    F32 largest = zero<F32>(), probe = zero<F32>();
    for (int64_t x = 0; x < n * R; x += F32::kLanes) {
      const F32 w = foveal::load(p + x);
      largest = max(largest, abs(w));
      probe = fma(w, zero<F32>(), probe);
    }
    largest = over_keys<F32, R>(largest, [](float x, float y) { return x > y ? x : y; });
    probe = over_keys<F32, R>(probe, [](float x, float y) { return x + y; });
    alignas(64) float largest_of[F32::kLanes], probe_of[F32::kLanes], inverse_of[F32::kLanes];
    store(largest_of, largest);
    store(probe_of, probe);
    for (int lane = 0; lane < F32::kLanes; ++lane) {
      const Step step(largest_of[lane], probe_of[lane], INT16_MAX);
      inverse_of[lane] = step.inverse;
      if (lane < R) unit[lane] = step.size;
    }
    const F32 inverse = foveal::load(inverse_of);
    for (int64_t x = 0; x < n * R; x += F32::kLanes) store_key_pairs<R>(foveal::load(p + x) * inverse, weights + x);
  }
};

}  // namespace
}  // namespace foveal

#endif  // FOVEAL_HAS_BF16_DOT
