// The values of a few-rows block by an instruction that multiplies pairs: two keys a multiply-add.
//
// With a group of four or more rows a head, float32 multiply-adds and not memory bound the decode kernel. Here the
// weights of keys 2x and 2x+1 are rounded to 16 bits and lie side by side, as do the values of the two keys, column by
// column. The denominator is summed before the rounding. `Pairs` says in which 16 bits: bfloat16 (below), where
// products are exact, sums float32, and rounding a weight costs what rounding the result costs (docs/numerics.md); or
// integers, for codes (code_pairs.inl.h).
#pragma once

#include "kernels/ahead.inl.h"
#include "kernels/arena.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

#ifdef FOVEAL_HAS_BF16_DOT

namespace foveal {
namespace {

struct BFloat16Pairs {
  using Weight = BFloat16;

  FOVEAL_INLINE static F32 load(const BFloat16* p) { return load_pairs(p); }
  FOVEAL_INLINE static F32 load_n(const BFloat16* p, int64_t n) { return load_pairs_n(p, n); }
  FOVEAL_INLINE static F32 dot(F32 values, F32 weights, F32 sum) { return dot_bf16(values, weights, sum); }
  FOVEAL_INLINE static F32 finish(F32 sum, float) { return sum; }

  // p[n][R], zeros up to a whole vector, as pairs of keys, R of them each. The sums come out in units of `unit`.
  template <int R>
  static void round_weights(const float* p, int64_t n, BFloat16* weights, float (&unit)[R]) {
    for (int64_t x = 0; x < n * R; x += F32::kLanes) store_key_pairs<R>(foveal::load(p + x), weights + x);
    for (int r = 0; r < R; ++r) unit[r] = 1;
  }
};

// o[R][NC * 32 columns] = o * rescale + p^T v.
template <class Pairs, int R, int NC, class C>
FOVEAL_INLINE void paired_value_step(const typename Pairs::Weight* weights, const float (&unit)[R], int64_t n,
                                     const Rows<C>& v, int64_t column, int64_t width, float* o, int64_t o_stride,
                                     const float* rescale, Ahead<C>& ahead) {
  constexpr int kChunk = 2 * F32::kLanes;
  F32 even[R][NC], odd[R][NC];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < NC; ++c) even[r][c] = odd[r][c] = zero<F32>();
  const auto values = [&](int64_t j, int c) __attribute__((always_inline)) {
    const C* x = v.row(j) + column + c * kChunk;
    return width >= NC * kChunk ? Pairs::load(x) : Pairs::load_n(x, width);
  };
  const auto add_pair = [&](int64_t j, bool alone) __attribute__((always_inline)) {
    F32 lower[NC], upper[NC];
#pragma GCC unroll 2
    for (int c = 0; c < NC; ++c)
      interleave_pairs(values(j, c), alone ? zero<F32>() : values(j + 1, c), lower[c], upper[c]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 w = broadcast_pair(weights + j * R + 2 * r);
#pragma GCC unroll 2
      for (int c = 0; c < NC; ++c) {
        even[r][c] = Pairs::dot(lower[c], w, even[r][c]);
        odd[r][c] = Pairs::dot(upper[c], w, odd[r][c]);
      }
    }
    ahead.used(alone ? width : 2 * width);
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) add_pair(j, false);
  if (j < n) add_pair(j, true);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < NC; ++c) {
      F32 left, right;
      separate_columns(even[r][c], odd[r][c], left, right);
      float* x = o + r * o_stride + c * kChunk;
      const F32 factor = broadcast<F32>(rescale[r]);
      store(x, fma(load(x), factor, Pairs::finish(left, unit[r])));
      if (width > c * kChunk + F32::kLanes)
        store(x + F32::kLanes, fma(load(x + F32::kLanes), factor, Pairs::finish(right, unit[r])));
    }
}

// p[n][R], zeros up to a whole vector, are the weights; NC chunks of 32 columns at once.
template <class Pairs, int R, int NC, class C>
static void decode_paired_values(const float* p, int64_t n, const Rows<C>& v, int64_t value_dim, float* o,
                                 int64_t o_stride, const float* rescale, Ahead<C>& ahead) {
  alignas(64) typename Pairs::Weight weights[kKeyBlock * R];
  float unit[R];
  Pairs::template round_weights<R>(p, n, weights, unit);
  constexpr int kColumns = NC * 2 * F32::kLanes;
  int64_t c = 0;
  for (; c + kColumns <= value_dim; c += kColumns)
    paired_value_step<Pairs, R, NC>(weights, unit, n, v, c, kColumns, o + c, o_stride, rescale, ahead);
  for (; c < value_dim; c += 2 * F32::kLanes)
    paired_value_step<Pairs, R, 1>(weights, unit, n, v, c, min64(2 * F32::kLanes, value_dim - c), o + c, o_stride,
                                   rescale, ahead);
}

}  // namespace
}  // namespace foveal

#endif  // FOVEAL_HAS_BF16_DOT
