// Sparsemax: w = max(s - tau, 0), tau such that the weights sum to 1 (Martins & Astudillo 2016).
//
// The argument is s, less the row's largest. Its solution over the keys above a threshold t that is too low,
//   tau = t + (sum (s - t) - 1) / count
// is too low itself, since keys between t and tau lower the sum: the search rises until no key drops out (Michelot
// 1986).
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/row_state.inl.h"
#include "kernels/threshold.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

struct Sparsemax {
  static constexpr double kArgument = kLn2;  // of one unit of score in base 2

  template <class V>
  FOVEAL_INLINE static V weight(V above) {
    return above;
  }
  // d weight / d argument, with a key's own threshold held still.
  template <class V>
  FOVEAL_INLINE static V slope(V above) {
    return select(greater(above, zero<V>()), broadcast<V>(1), above);
  }

  template <class V>
  FOVEAL_INLINE static void next(const ThresholdSums<V>& sums, ThresholdSearch<V>& search) {
    search.rise(sums, search.at + (sums.first - broadcast<V>(1)) / sums.count);
  }

  template <class V>
  FOVEAL_INLINE static V gradient_weight(V score, const RowTerms<V>& row) {
    return weight(above_threshold<Sparsemax>(score, row.shift, row.threshold));
  }
  // delta is the mean of dp over the keys that have weight.
  template <class V>
  FOVEAL_INLINE static V score_gradient(V w, V dp, const RowTerms<V>& row) {
    return select(equal(w, zero<V>()), zero<V>(), dp - row.delta);
  }
};

}  // namespace
}  // namespace foveal
