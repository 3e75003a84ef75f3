// The derivative of one score, for every kernel of the backward pass.
//
//   w = exp(s - lse)      db = w (dp - delta)      ds = db * slope        dp = dout . v,  delta = dout . out - dlse
//
// (Dao et al. 2022, appendix B.2): db is the gradient of the bias, ds that of scale * q . k. Where the row does not see
// the key all three are 0, whatever dot and dp are.
#pragma once

#include "cuda/score.h"
#include "cuda/shape.h"

namespace foveal::cuda {

// Where the rows of one head of a segment begin in row_lse and row_delta (backward_rows.h): a multiple of kRowPitch.
FOVEAL_DEVICE int64_t row_start(const Params& p, const Span& span, int segment, int head) {
  if (p.cu_seqlens_q.data == nullptr) return (static_cast<int64_t>(segment) * p.num_heads + head) * p.row_pitch;
  return static_cast<int64_t>(head) * p.row_pitch + (span.q_begin / kRowPitch + segment) * kRowPitch;
}

template <class Real>
struct PairGradient {
  Real weight = Real(0);
  Real bias = Real(0);
  Real score = Real(0);
};

template <class Real>
FOVEAL_DEVICE PairGradient<Real> differentiate(const ScorePolicy<Real>& policy, const Span& span, int query, int key,
                                               Real dot, Real dp, Real lse, Real delta) {
  PairGradient<Real> g;
  if (!span.sees(query, key) || !policy.visible(query, key)) return g;
  Real slope;
  const Real score = policy.apply(dot, query, key, span.offset + query, slope);
  if (score == static_cast<Real>(negative_infinity())) return g;  // a bias of -inf hides like a mask
  g.weight = exponential(score - lse);
  g.bias = g.weight * (dp - delta);
  g.score = g.bias * slope;
  return g;
}

}  // namespace foveal::cuda
