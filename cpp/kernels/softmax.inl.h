// Softmax: w = exp(s) / sum exp(s) (Vaswani et al. 2017, eq. 1). A normaliser of one pass (row_state.inl.h).
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/elementary.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/row_state.inl.h"
#include "kernels/statistics.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Online softmax in base 2 (Milakov & Gimelshein 2018). Members: the largest score so far, and the sum of
// 2^(score - max). A row begins at (-inf, 0), or at (sink, 1) with a sink, a key without a value that every row sees
// first. A row whose max is still -inf has seen nothing: its weights are 0, and so is its output.
struct Softmax {
  // Where several lanes share a row (few rows): whether each has a part of a member, or all have the same.
  static constexpr bool kSumsOverLanes[kRowMembers] = {false, true};

  template <class T>
  FOVEAL_INLINE static void begin(const HeadTask& h, int64_t row, bool with_sink, T* state, int64_t stride) {
    const double sink = with_sink && h.sinks != nullptr ? h.sinks[row % h.group] * kLog2E : -__builtin_inf();
    T& max = state[kRowMax * stride];
    max = static_cast<T>(sink);
    state[kRowSum * stride] = max == -static_cast<T>(__builtin_inf()) ? T{0} : T{1};
  }

  // `s` holds `steps` steps of NV vectors, `highest` their maxima. With `mark_masked` the weight of a score of -inf is
  // -0, which its sign tells from a weight that is too small. `stats`, where it has a state, takes the block along.
  template <class V, int NV>
  FOVEAL_INLINE static void step(RowState<V, NV>& state, typename V::T* s, int64_t steps, const V (&highest)[NV],
                                 V (&rescale)[NV], bool mark_masked, const TileStats<V>& stats = {}) {
    if (stats.state != nullptr) return step_with_statistics(state, s, steps, highest, rescale, mark_masked, stats);
    V base[NV], sum[NV];
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) {
      V& max_so_far = state.of[kRowMax][r];
      const V before = max_so_far;
      max_so_far = max(before, highest[r]);
      base[r] = or_zero_if_unseen(max_so_far);
      rescale[r] = exp2_nonpositive(before - base[r]);
      sum[r] = zero<V>();
    }
    if (mark_masked) {
      const V masked = zero<V>() * broadcast<V>(-1);
      for (int64_t j = 0; j < steps; ++j)
        for (int r = 0; r < NV; ++r) {
          typename V::T* x = s + (j * NV + r) * V::kLanes;
          const V score = load(x);
          const V w = exp2_nonpositive(score - base[r]);
          sum[r] = sum[r] + w;
          store(x, select(equal(score, negative_infinity<V>()), masked, w));
        }
    } else {
      for (int64_t j = 0; j < steps; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < NV; ++r) {
          typename V::T* x = s + (j * NV + r) * V::kLanes;
          const V w = exp2_nonpositive(load(x) - base[r]);
          sum[r] = sum[r] + w;
          store(x, w);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) state.of[kRowSum][r] = fma(state.of[kRowSum][r], rescale[r], sum[r]);
  }

  template <class V, int NV>
  FOVEAL_INLINE static V scale(const RowState<V, NV>& state, int r) {
    const V sum = state.of[kRowSum][r];
    return select(equal(sum, zero<V>()), zero<V>(), broadcast<V>(1) / sum);
  }

  template <class V, int NV>
  FOVEAL_INLINE static V final_weight(const RowState<V, NV>& state, int r, V score) {
    return exp2_nonpositive(score - or_zero_if_unseen(state.of[kRowMax][r])) * scale(state, r);
  }

  // Member m of part p is at state[m * stride + p * part_stride]. In base 2, with m the largest max (the sink's too),
  //   sum = sum_p 2^(max_p - m) sum_p  +  2^(sink - m)
  // Part p's sums are worth 2^(max_p - m) then, which takes the place of its max. Returns the joined state.
  template <class V>
  static RowState<V, 1> join(const HeadTask& h, int64_t row, typename V::T* state, int64_t stride, int64_t part_stride,
                             int64_t parts) {
    using T = typename V::T;
    T joined[kRowMembers];
    begin(h, row, true, joined, 1);
    const T sink = joined[kRowMax];
    T highest = sink, total = joined[kRowSum];
    T* max = state + kRowMax * stride;
    const T* sum = state + kRowSum * stride;
    for (int64_t p = 0; p < parts; ++p) {
      const T x = max[p * part_stride];
      if (x > highest || x != x) highest = x;
    }
    const V shift = or_zero_if_unseen(broadcast<V>(highest));
    alignas(64) T lanes[V::kLanes];
    const auto worth = [&](T x) {
      store(lanes, exp2_nonpositive(broadcast<V>(x) - shift));
      return lanes[0];
    };
    total *= worth(sink);
    for (int64_t p = 0; p < parts; ++p) {
      max[p * part_stride] = worth(max[p * part_stride]);
      total += sum[p * part_stride] * max[p * part_stride];
    }
    RowState<V, 1> result;
    result.of[kRowMax][0] = broadcast<V>(highest);
    result.of[kRowSum][0] = broadcast<V>(total);
    return result;
  }

  // The largest weight, in units of the sums.
  template <class V>
  FOVEAL_INLINE static V largest_weight(V highest, const RowState<V, 1>& state) {
    return exp2_nonpositive(highest - or_zero_if_unseen(state.of[kRowMax][0]));
  }

  // shift is the lse of the row. Scores may be of the size of finfo.min, and the rounding of the lse alone could then
  // make a weight infinite.
  template <class V>
  FOVEAL_INLINE static V gradient_weight(V score, const RowTerms<V>& row) {
    return exp2_nonpositive(min(zero<V>(), score - row.shift));
  }
  // The same for scores straight from the product.
  template <class V>
  FOVEAL_INLINE static V plain_gradient_weight(V score, V lse) {
    return exp2_nonpositive(score - lse);
  }
  // delta is dout . out (Dao et al. 2022, appendix B.2), less the gradient of the lse.
  template <class V>
  FOVEAL_INLINE static V score_gradient(V w, V dp, const RowTerms<V>& row) {
    return w * (dp - row.delta);
  }

 private:
  // The same weights, and sums of them without a sink. When the base moves by d, a sum of w log2 w does by d sum(w).
  template <class V, int NV>
  static void step_with_statistics(RowState<V, NV>& state, typename V::T* s, int64_t steps, const V (&highest)[NV],
                                   V (&rescale)[NV], bool mark_masked, const TileStats<V>& stats) {
    const V lowest = broadcast<V>(Exp2<typename V::T>::kLowest);
    const V masked = mark_masked ? zero<V>() * broadcast<V>(-1) : zero<V>();
    for (int r = 0; r < NV; ++r) {
      V& max_so_far = state.of[kRowMax][r];
      const V before = max_so_far;
      max_so_far = max(before, highest[r]);
      const V base = or_zero_if_unseen(max_so_far), moved = max(lowest, before - base);
      rescale[r] = exp2_nonpositive(before - base);
      V sum = zero<V>(), logs = zero<V>();
      for (int64_t j = 0; j < steps; ++j) {
        typename V::T* at = s + (j * NV + r) * V::kLanes;
        const V score = load(at), x = score - base, w = exp2_nonpositive(x);
        sum = sum + w;
        logs = fma(w, max(lowest, x), logs);
        store(at, select(equal(score, negative_infinity<V>()), masked, w));
      }
      state.of[kRowSum][r] = fma(state.of[kRowSum][r], rescale[r], sum);
      typename V::T *own_sum = stats.member(kStatSum, r), *own_logs = stats.member(kStatLogs, r);
      const V had = load(own_sum);
      store(own_logs, fma(fma(moved, had, load(own_logs)), rescale[r], logs));
      store(own_sum, fma(had, rescale[r], sum));
    }
  }

  // What to subtract from the scores of a row: its max, or 0 where that would be -inf - -inf.
  template <class V>
  FOVEAL_INLINE static V or_zero_if_unseen(V highest) {
    return select(equal(highest, negative_infinity<V>()), zero<V>(), highest);
  }
};

}  // namespace
}  // namespace foveal
