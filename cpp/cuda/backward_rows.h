// What the backward pass needs of each query row before any pair is met, and the gradient of the sinks, which needs no
// more than that.
//
//   row_lse     lse of the forward pass, +inf for rows without keys and rows past q_len: every weight becomes 0
//   row_delta   dout . out - dlse (Dao et al. 2022, appendix B.2), 0 for those rows
//   dsinks_h    - sum over batch and rows of exp(sink - lse) * delta: a sink is a score whose dout . v is 0
//
// The rows of a segment and head begin at row_start, a multiple of kRowPitch, and are padded to one: so the rows of a
// walked tile load in 16-byte chunks.
#pragma once

#include "cuda/pair_gradient.h"
#include "cuda/reduce.h"

namespace foveal::cuda {

// A block takes kRowPitch rows of one head, each warp one after another.
template <class Real>
FOVEAL_DEVICE void prepare_rows(const Params& p) {
  const Real infinity = -static_cast<Real>(negative_infinity());
  const Block block = locate_block<kRowPitch, false>(p, p.num_heads, false);
  const Span span(p, block.segment);
  if (block.first >= span.q_extent) return;
  const int64_t start = row_start(p, span, block.segment, block.head);
  for (int query = block.first + thread_index() / 32; query < block.first + kRowPitch; query += kPrepareThreads / 32) {
    Real lse = infinity, delta = Real(0);
    if (query < span.q_len) {
      const int row = span.q_begin + query;
      const Real found = read_real<Real>(p.lse, offset_of(p.lse, span.batch, block.head, row));
      if (found != -infinity) {
        lse = found;
        const int64_t out = offset_of(p.out, span.batch, block.head, row);
        const int64_t dout = offset_of(p.dout, span.batch, block.head, row);
#pragma unroll 1
        for (int d = lane_index(); d < p.value_dim; d += 32) {
          delta = fused_multiply_add(read_real<Real>(p.dout, dout + d * p.dout.stride[3]),
                                     read_real<Real>(p.out, out + d * p.out.stride[3]), delta);
        }
        delta = warp_sum(delta);
        if (p.dlse.data) delta -= read_real<Real>(p.dlse, offset_of(p.dlse, span.batch, block.head, row));
      }
    }
    if (lane_index() == 0) {
      static_cast<Real*>(p.row_lse)[start + query] = lse;
      static_cast<Real*>(p.row_delta)[start + query] = delta;
    }
  }
}

// One block a head; which thread takes which row depends on the problem's extents alone.
template <class Real>
FOVEAL_DEVICE void differentiate_sinks(const Params& p) {
  const int head = block_index_x();
  const Real sink = read_real<Real>(p.sinks, offset_of(p.sinks, head));
  Real sum = Real(0);
  if (sink != static_cast<Real>(negative_infinity())) {
    for (int segment = 0; segment < num_segments(p); ++segment) {
      const Span span(p, segment);
      const int64_t base = row_start(p, span, segment, head);
      for (int query = thread_index(); query < span.q_len; query += kSinkThreads) {
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
