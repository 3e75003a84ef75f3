// ReLU attention: w = max(s, 0) / n (Wortsman et al. 2023, "Replacing softmax with ReLU in Vision Transformers").
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/pointwise.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

struct Relu : Pointwise<Relu> {
  static constexpr bool kHidesZeros = true;

  // In base 2, and without the factor 1/n: `scale` has both.
  template <class V>
  FOVEAL_INLINE static V weight(V score, V) {
    return max(zero<V>(), score);
  }
  template <class V>
  FOVEAL_INLINE static V factor(V n) {
    return broadcast<V>(static_cast<typename V::T>(kLn2)) / n;
  }

  // delta is 1 / n.
  template <class T>
  FOVEAL_INLINE static T row_term(T n) {
    return n > 0 ? 1 / n : T{0};
  }
  template <class V>
  FOVEAL_INLINE static V gradient_weight(V score, const RowTerms<V>& row) {
    return max(zero<V>(), score) * broadcast<V>(static_cast<typename V::T>(kLn2)) * row.delta;
  }
  template <class V>
  FOVEAL_INLINE static V score_gradient(V w, V dp, const RowTerms<V>& row) {
    return select(equal(w, zero<V>()), zero<V>(), row.delta * dp);
  }
};

}  // namespace
}  // namespace foveal
