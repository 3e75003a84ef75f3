// Sigmoid attention: w = sigmoid(s - log n) (Ramapuram et al. 2025, "Theory, Analysis, and Best Practices for Sigmoid
// Self-Attention").
#pragma once

#include "kernels/elementary.inl.h"
#include "kernels/pointwise.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

struct Sigmoid : Pointwise<Sigmoid> {
  static constexpr bool kHidesZeros = false;

  // 1 / (1 + n e^-s), with the power that is at most 1. A row without keys has only scores of -inf.
  template <class V>
  FOVEAL_INLINE static V weight(V score, V n) {
    const V one = broadcast<V>(1), t = exp2_nonpositive(zero<V>() - abs(score));
    // As a fraction, (1 or t) / (1 or t + n times the other).
    const V above = select(sign_mask(score), t, one);
    return above * reciprocal(fma(max(one, n), one + t - above, above));
  }
  template <class V>
  FOVEAL_INLINE static V factor(V) {
    return broadcast<V>(1);
  }

  // delta is n.
  template <class T>
  FOVEAL_INLINE static T row_term(T n) {
    return n;
  }
  template <class V>
  FOVEAL_INLINE static V gradient_weight(V score, const RowTerms<V>& row) {
    return weight(score, row.delta);
  }
  template <class V>
  FOVEAL_INLINE static V score_gradient(V w, V dp, const RowTerms<V>&) {
    return w * (broadcast<V>(1) - w) * dp;
  }
};

}  // namespace
}  // namespace foveal
