// What happens to a score between the product and the softmax: scale, softcap, bias, ALiBi, and the masks.
//
//   s = softcap(scale * q.k) + bias - slope * |position - key|       then -inf where the row does not see the key
//
// `ScorePolicy` is the meaning for one head; the tile functions apply it to the fragments of a warp. A row of a
// fragment is described by `query_of(m, half)` and `head_of(m, half)`, so that packed grouped-query rows and plain rows
// share the code.
#pragma once

#include "cuda/softmax.h"
#include "cuda/span.h"
#include "cuda/tile.h"

namespace foveal::cuda {

template <class Real>
class ScorePolicy {
 public:
  FOVEAL_DEVICE ScorePolicy(const Params& p, int batch, int head)
      : p_(p), bias_(offset_of(p.bias, batch, head)), mask_(offset_of(p.mask, batch, head)) {
    slope_ = p.alibi_slopes.data ? read_real<Real>(p.alibi_slopes, offset_of(p.alibi_slopes, batch, head)) : Real(0);
  }

  FOVEAL_DEVICE bool visible(int query, int key) const {
    return p_.mask.data == nullptr ||
           static_cast<const uint8_t*>(p_.mask.data)[mask_ + offset_of(p_.mask, 0, 0, query, key)] != 0;
  }

  FOVEAL_DEVICE Real apply(Real dot, int query, int key, int position) const {
    Real slope;
    return apply(dot, query, key, position, slope);
  }

  // `slope` receives the derivative of the score by scale * dot: 1 without a softcap.
  FOVEAL_DEVICE Real apply(Real dot, int query, int key, int position, Real& slope) const {
    Real s = dot * static_cast<Real>(p_.scale);
    slope = Real(1);
    if (p_.softcap > 0.0) {
      const Real cap = static_cast<Real>(p_.softcap);
      const Real t = hyperbolic_tangent(s / cap);
      slope = fused_multiply_add(-t, t, Real(1));
      s = cap * t;
    }
    if (p_.bias.data) s += read_real<Real>(p_.bias, bias_ + offset_of(p_.bias, 0, 0, query, key));
    const int distance = position < key ? key - position : position - key;
    return fused_multiply_add(-slope_, static_cast<Real>(distance), s);
  }

 private:
  const Params& p_;
  int64_t bias_, mask_;
  Real slope_;
};

// Lengths, causal and window: -inf outside the row's range.
template <int kM, int kN, class QueryOf>
FOVEAL_DEVICE void mask_by_position(float (&score)[kM][kN][4], const Span& span, int first_key, QueryOf query_of) {
  const int lane_key = first_key + 2 * (lane_index() & 3);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query_of(m, half);
      const int first = span.first_key(query);
      const int end = span.end_key(query);
      const unsigned count = end > first ? end - first : 0;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          if (static_cast<unsigned>(lane_key + 8 * n + odd - first) >= count)
            score[m][n][2 * half + odd] = negative_infinity();
    }
  }
}

// All policies, element by element; operands are read only where the row sees the key. Leaves scores in natural units.
template <int kM, int kN, class QueryOf, class HeadOf>
FOVEAL_DEVICE void apply_policies(float (&score)[kM][kN][4], const Params& p, const Span& span, int batch,
                                  int first_key, QueryOf query_of, HeadOf head_of) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query_of(m, half);
      const bool real = query < span.q_len;
      const ScorePolicy<float> policy(p, batch, real ? head_of(m, half) : 0);
      const int first = span.first_key(query);
      const int end = real ? span.end_key(query) : first;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int key = first_key + 2 * (lane_index() & 3) + 8 * n + odd;
          float& s = score[m][n][2 * half + odd];
          const bool visible = key >= first && key < end && policy.visible(query, key);
          s = visible ? policy.apply(s, query, key, span.offset + query) : negative_infinity();
        }
      }
    }
  }
}

}  // namespace foveal::cuda
