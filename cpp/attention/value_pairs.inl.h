// The values of a few-rows block by the instruction that multiplies pairs of bfloat16: two keys a multiply-add.
//
// With a group of four or more rows a head, float32 multiply-adds and not memory bound the decode kernel. Here the
// weights of keys 2x and 2x+1 are rounded to bfloat16 and lie side by side, as do the values of the two keys, column by
// column; products are exact and sums float32. Rounding a weight costs what rounding the result costs
// (docs/numerics.md). The denominator is summed before the rounding.
#pragma once

namespace foveal {
namespace {

template <class V, class S, int R>
constexpr bool kPairsValues = false;

#ifdef FOVEAL_HAS_BF16_DOT
template <int R>
constexpr bool kPairsValues<F32, BFloat16, R> = R >= 4;

// o[R][NC * 32 columns] = o * rescale + p^T v. `weights` holds pairs of keys, R of them each.
template <int R, int NC, class C>
FOVEAL_INLINE void paired_value_step(const BFloat16* weights, int64_t n, const Rows<C>& v, int64_t column,
                                     int64_t width, float* o, int64_t o_stride, const float* rescale, Ahead<C>& ahead) {
  constexpr int kChunk = 2 * F32::kLanes;
  F32 even[R][NC], odd[R][NC];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < NC; ++c) even[r][c] = odd[r][c] = zero<F32>();
  const auto values = [&](int64_t j, int c) __attribute__((always_inline)) {
    const C* x = v.row(j) + column + c * kChunk;
    return width >= NC * kChunk ? load_pairs(x) : load_pairs_n(x, width);
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
        even[r][c] = dot_bf16(lower[c], w, even[r][c]);
        odd[r][c] = dot_bf16(upper[c], w, odd[r][c]);
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
      store(x, fma(load(x), factor, left));
      if (width > c * kChunk + F32::kLanes) store(x + F32::kLanes, fma(load(x + F32::kLanes), factor, right));
    }
}

// p[n][R], zeros up to a whole vector, are the weights; NC chunks of 32 columns at once.
template <int R, int NC, class C>
static void decode_paired_values(const float* p, int64_t n, const Rows<C>& v, int64_t value_dim, float* o,
                                 int64_t o_stride, const float* rescale, Ahead<C>& ahead) {
  alignas(64) BFloat16 weights[kKeyBlock * R];
  for (int64_t x = 0; x < n * R; x += F32::kLanes) store_key_pairs<R>(load(p + x), weights + x);
  constexpr int kColumns = NC * 2 * F32::kLanes;
  int64_t c = 0;
  for (; c + kColumns <= value_dim; c += kColumns)
    paired_value_step<R, NC>(weights, n, v, c, kColumns, o + c, o_stride, rescale, ahead);
  for (; c < value_dim; c += 2 * F32::kLanes)
    paired_value_step<R, 1>(weights, n, v, c, min64(2 * F32::kLanes, value_dim - c), o + c, o_stride, rescale, ahead);
}
#endif

}  // namespace
}  // namespace foveal
