// What the pointwise normalisers have in common: a weight depends on its own score and on n, the number of keys that
// position and length leave to the row. The state of a row is (0, n) from beginning to end, sums add up as they are,
// and what the row saves is log n.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/row_state.inl.h"
#include "kernels/statistics.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// N has weight(score in base 2, n), and factor(n), which the sums are multiplied by at the end.
template <class N>
struct Pointwise {
  // Where several lanes share a row, all have the same of each member.
  static constexpr bool kSumsOverLanes[kRowMembers] = {false, false};

  static int64_t visible_count(const HeadTask& h, int64_t row) {
    const int64_t position = h.q_offset + row / h.group;
    return max64(clamp64(position + h.counted_right + 1, 0, h.kv_len) - clamp64(position - h.counted_left, 0, h.kv_len),
                 0);
  }

  template <class T>
  FOVEAL_INLINE static void begin(const HeadTask& h, int64_t row, bool, T* state, int64_t stride) {
    state[kRowMax * stride] = 0;
    state[kRowSum * stride] = static_cast<T>(visible_count(h, row));
  }

  // With `mark_masked` a weight of 0 is -0: that of a score of -inf, or of a key that the normaliser itself hides.
  template <class V, int NV>
  FOVEAL_INLINE static void step(RowState<V, NV>& state, typename V::T* s, int64_t steps, const V (&)[NV],
                                 V (&rescale)[NV], bool mark_masked, const TileStats<V>& stats = {}) {
    const V masked = zero<V>() * broadcast<V>(-1);
    for (int r = 0; r < NV; ++r) rescale[r] = broadcast<V>(1);
    for (int64_t j = 0; j < steps; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < NV; ++r) {
        typename V::T* x = s + (j * NV + r) * V::kLanes;
        const V score = load(x);
        V w = N::weight(score, state.of[kRowSum][r]);
        if (mark_masked)
          w = select(N::kHidesZeros ? equal(w, zero<V>()) : equal(score, negative_infinity<V>()), masked, w);
        store(x, w);
      }
    if (stats.state != nullptr) add_weights<V, NV>(stats, s, steps);
  }

  template <class V, int NV>
  FOVEAL_INLINE static V scale(const RowState<V, NV>& state, int r) {
    const V n = state.of[kRowSum][r];
    return select(equal(n, zero<V>()), zero<V>(), N::factor(n));
  }

  template <class V, int NV>
  FOVEAL_INLINE static V final_weight(const RowState<V, NV>& state, int r, V score) {
    return N::weight(score, state.of[kRowSum][r]) * scale(state, r);
  }

  template <class V>
  FOVEAL_INLINE static V largest_weight(V highest, const RowState<V, 1>& state) {
    return N::weight(highest, state.of[kRowSum][0]);
  }

  template <class V>
  static RowState<V, 1> join(const HeadTask& h, int64_t row, typename V::T* state, int64_t stride, int64_t part_stride,
                             int64_t parts) {
    for (int64_t p = 0; p < parts; ++p) state[kRowMax * stride + p * part_stride] = 1;
    RowState<V, 1> result;
    result.of[kRowMax][0] = zero<V>();
    result.of[kRowSum][0] = broadcast<V>(static_cast<typename V::T>(visible_count(h, row)));
    return result;
  }
};

}  // namespace
}  // namespace foveal
