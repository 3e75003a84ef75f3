// What the backward pass needs of each query row before any pair is met, and the gradient of the sinks, which needs no
// more than that.
//
//   row_lse     lse of the forward pass, +inf for rows without keys and rows past q_len: every weight becomes 0
//   row_delta   dout . out - dlse (Dao et al. 2022, appendix B.2), 0 for those rows
//   dsinks_h    - sum over batch and rows of exp(sink - lse) * delta: a sink is a score whose dout . v is 0
//
// Both row arrays are (B, Hq, row_pitch): padded to whole tiles, so that a tile's rows load in 16-byte chunks.
#pragma once

#include "cuda/reduce.h"
#include "cuda/score.h"
#include "cuda/shape.h"

namespace foveal::cuda {

// One warp a row.
template <class Real>
FOVEAL_DEVICE void prepare_rows(const Params& p) {
  const Real infinity = -static_cast<Real>(negative_infinity());
  const int64_t row = static_cast<int64_t>(block_index_x()) * kPreparedRows + thread_index() / 32;
  if (row >= static_cast<int64_t>(p.batch) * p.num_heads * p.row_pitch) return;
  const int query = static_cast<int>(row % p.row_pitch);
  const int head = static_cast<int>(row / p.row_pitch % p.num_heads);
  const int batch = static_cast<int>(row / p.row_pitch / p.num_heads);
  const Span span(p, batch);
  Real lse = infinity, delta = Real(0);
  if (query < span.q_len) {
    const Real found = read_real<Real>(p.lse, offset_of(p.lse, batch, head, query));
    if (found != -infinity) {
      lse = found;
      const int64_t out = offset_of(p.out, batch, head, query), dout = offset_of(p.dout, batch, head, query);
#pragma unroll 1
      for (int d = lane_index(); d < p.value_dim; d += 32) {
        delta = fused_multiply_add(read_real<Real>(p.dout, dout + d * p.dout.stride[3]),
                                   read_real<Real>(p.out, out + d * p.out.stride[3]), delta);
      }
      delta = warp_sum(delta);
      if (p.dlse.data) delta -= read_real<Real>(p.dlse, offset_of(p.dlse, batch, head, query));
    }
  }
  if (lane_index() == 0) {
    static_cast<Real*>(p.row_lse)[row] = lse;
    static_cast<Real*>(p.row_delta)[row] = delta;
  }
}

// One block a head; which thread takes which row depends on the problem's extents alone.
template <class Real>
FOVEAL_DEVICE void differentiate_sinks(const Params& p) {
  const int head = block_index_x();
  const Real sink = read_real<Real>(p.sinks, offset_of(p.sinks, head));
  Real sum = Real(0);
  if (sink != static_cast<Real>(negative_infinity())) {
    for (int batch = 0; batch < p.batch; ++batch) {
      const int64_t base = (static_cast<int64_t>(batch) * p.num_heads + head) * p.row_pitch;
      for (int query = thread_index(); query < p.seqlen_q; query += kSinkThreads) {
        const Real lse = static_cast<const Real*>(p.row_lse)[base + query];
        sum = fused_multiply_add(-exponential(sink - lse), static_cast<const Real*>(p.row_delta)[base + query], sum);
      }
    }
  }
  Real* part = reinterpret_cast<Real*>(shared_memory());
  sum = warp_sum(sum);
  if (lane_index() == 0) part[thread_index() / 32] = sum;
  block_barrier();
  if (thread_index() == 0) {
    for (int warp = 1; warp < kSinkThreads / 32; ++warp) sum += part[warp];
    write_real(p.dsinks, offset_of(p.dsinks, head), sum);
  }
}

}  // namespace foveal::cuda
