// 1.5-entmax: w = max(s/2 - tau, 0)^2, tau such that the weights sum to 1 (Peters, Niculae & Martins 2019).
//
// The argument is s/2, less the row's largest. With x = argument - t over the keys above t,
//   f(t) = sum x^2 - 1
// is convex and falls. A Newton step from below never passes the root. The root of the same quadratic,
//   tau = t + f / (sum x + sqrt((sum x)^2 - count f)),
// is exact when no key lies between t and tau; else it is too high from below (keys that drop out count as squares),
// and too low from above. So the two together close in on the root from both sides.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/row_state.inl.h"
#include "kernels/threshold.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

struct Entmax15 {
  static constexpr double kArgument = kLn2 / 2;

  template <class V>
  FOVEAL_INLINE static V weight(V above) {
    return above * above;
  }
  template <class V>
  FOVEAL_INLINE static V slope(V above) {
    return above;
  }

  template <class V>
  FOVEAL_INLINE static void next(const ThresholdSums<V>& sums, ThresholdSearch<V>& search) {
    const V f = sums.second - broadcast<V>(1), discriminant = fma(sums.first, sums.first, zero<V>() - sums.count * f);
    search.close_in(sums, f, search.at + f / (sums.first + sqrt(discriminant)),
                    search.at + f / (sums.first + sums.first));
  }

  template <class V>
  FOVEAL_INLINE static V gradient_weight(V score, const RowTerms<V>& row) {
    return weight(above_threshold<Entmax15>(score, row.shift, row.threshold));
  }
  // delta is the mean of dp, weighed by the roots of the weights (Peters et al. 2019, section 4; Correia et al. 2019).
  template <class V>
  FOVEAL_INLINE static V score_gradient(V w, V dp, const RowTerms<V>& row) {
    return select(equal(w, zero<V>()), zero<V>(), sqrt(w) * (dp - row.delta));
  }
};

}  // namespace
}  // namespace foveal
