// Forward in its plainest form: any dtype, any strides, every option. The path of float32 and float64, of arrays that
// the tensor-core path cannot load in 16-byte chunks, and of `weights`.
//
// A block takes kWarps * kRowsPerWarp query rows of one head and 32 keys at a time. While scores are made a lane is a
// key and reads its key from shared memory (rows padded by one element, so 32 lanes meet 32 banks); while values are
// summed a lane is a value column. Every element is read through its strides and widened when it enters shared memory.
//
//   shared memory   [ Q rows x D ][ K, then V: 32 x (max(D, Dv) + 1) ]  of Real
//
// Numerical contract: everything accumulates in Real, the result is rounded once. Keys of weight zero are left out of
// the sum, so NaN or inf behind a mask does not reach it.
#pragma once

#include "cuda/plain.h"
#include "cuda/reduce.h"
#include "cuda/score.h"
#include "cuda/shape.h"

namespace foveal::cuda {

// Query rows [first_row, first_row + kRows) of one head, by all threads of the block.
template <class Config>
FOVEAL_DEVICE void forward_plain_rows(const Params& p, const Span& span, int head, int first_row) {
  using Real = typename Config::Real;
  constexpr int kR = Config::kRowsPerWarp;
  constexpr int kColumns = kMaxHeadDim / 32;
  const Real minus_infinity = static_cast<Real>(negative_infinity());
  const int batch = span.batch;
  const int kv_head = head / p.group;
  const int lane = lane_index();
  const int warp_row = thread_index() / 32 * kR;
  const int pitch = (p.head_dim > p.value_dim ? p.head_dim : p.value_dim) + 1;
  Real* q = reinterpret_cast<Real*>(shared_memory());
  Real* kv = q + Config::kRows * p.head_dim;
  const ScorePolicy<Real> policy(p, batch, head);

  const int end_row = first_row + Config::kRows < span.q_len ? first_row + Config::kRows : span.q_len;
  const int begin_key = span.first_key(first_row) / kPlainKeys * kPlainKeys;
  const int end_key = end_row > first_row ? span.end_key(end_row - 1) : 0;

  block_barrier();  // shared memory may still hold what the caller did before
  if (end_row > first_row) {
    stage_rows<Config>(q, p.head_dim, p.q, offset_of(p.q, batch, head, span.q_begin), first_row, end_row - first_row,
                       p.head_dim);
  }

  // Scores of this lane's key for the warp's rows, -inf where unseen. K passes through `kv`.
  const auto score_keys = [&](Real(&score)[kR], int first_key) {
    block_barrier();
    const int count = end_key - first_key < kPlainKeys ? end_key - first_key : kPlainKeys;
    stage_keys<Config>(kv, pitch, p, p.k, batch, kv_head, span.kv_begin + first_key, count, p.head_dim);
    block_barrier();
    for (int r = 0; r < kR; ++r) score[r] = Real(0);
    if (lane < count) {
      for (int d = 0; d < p.head_dim; ++d) {
        const Real key_element = kv[lane * pitch + d];
#pragma unroll
        for (int r = 0; r < kR; ++r)
          score[r] = fused_multiply_add(q[(warp_row + r) * p.head_dim + d], key_element, score[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int query = first_row + warp_row + r;
      const int key = first_key + lane;
      const bool visible =
          query < span.q_len && key >= span.first_key(query) && key < span.end_key(query) && policy.visible(query, key);
      score[r] = visible ? policy.apply(score[r], query, key, span.offset + query) : minus_infinity;
    }
  };

  Real row_max[kR], row_sum[kR], out[kR][kColumns];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    row_max[r] = minus_infinity;
    row_sum[r] = Real(0);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[r][c] = Real(0);
  }

  for (int first_key = begin_key; first_key < end_key; first_key += kPlainKeys) {
    Real weight[kR];
    score_keys(weight, first_key);
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const Real top = maximum(row_max[r], warp_max(weight[r]));
      const Real shift = top == minus_infinity ? Real(0) : top;
      const Real factor = exponential(row_max[r] - shift);
      row_max[r] = top;
      weight[r] = exponential(weight[r] - shift);
      row_sum[r] = row_sum[r] * factor + warp_sum(weight[r]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[r][c] *= factor;
    }
    block_barrier();
    const int count = end_key - first_key < kPlainKeys ? end_key - first_key : kPlainKeys;
    stage_keys<Config>(kv, pitch, p, p.v, batch, kv_head, span.kv_begin + first_key, count, p.value_dim);
    block_barrier();
    for (int key = 0; key < count; ++key) {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const Real w = shuffle(weight[r], key);
        if (w == Real(0)) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (lane + 32 * c < p.value_dim)
            out[r][c] = fused_multiply_add(w, kv[key * pitch + lane + 32 * c], out[r][c]);
        }
      }
    }
  }

  Real inverse[kR], lse[kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int query = first_row + warp_row + r;
    Real top = row_max[r], total = row_sum[r], factor = Real(1);
    if (p.sinks.data && query < span.q_len) {
      const Real sink = read_real<Real>(p.sinks, offset_of(p.sinks, head));
      top = maximum(row_max[r], sink);
      const Real shift = top == minus_infinity ? Real(0) : top;
      factor = exponential(row_max[r] - shift);
      total = row_sum[r] * factor + exponential(sink - shift);
    }
    inverse[r] = row_sum[r] != Real(0) ? factor / total : Real(0);
    lse[r] = total != Real(0) ? top + logarithm(total) : minus_infinity;
    if (query >= span.q_extent) continue;
    const int64_t base = offset_of(p.out, batch, head, span.q_begin + query);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = lane + 32 * c;
      if (d < p.value_dim) write_real(p.out, base + d * p.out.stride[3], out[r][c] * inverse[r]);
    }
    if (p.lse.data && lane == 0) write_real(p.lse, offset_of(p.lse, batch, head, span.q_begin + query), lse[r]);
  }

  if (p.weights.data) {  // a second pass over the keys, now that the denominators are known
    for (int first_key = 0; first_key < p.seqlen_kv; first_key += kPlainKeys) {
      Real weight[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) weight[r] = minus_infinity;
      if (first_key >= begin_key && first_key < end_key) score_keys(weight, first_key);
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int query = first_row + warp_row + r;
        const int key = first_key + lane;
        if (query >= p.seqlen_q || key >= p.seqlen_kv) continue;
        const Real w = weight[r] == minus_infinity ? Real(0) : exponential(weight[r] - lse[r]);
        write_real(p.weights, offset_of(p.weights, batch, head, query, key), w);
      }
    }
  }
}

template <class Config>
FOVEAL_DEVICE void forward_plain(const Params& p) {
  const Block block = locate_block<Config::kRows, false>(p, p.num_heads, false);
  const Span span(p, block.segment);
  if (block.first < span.q_extent) forward_plain_rows<Config>(p, span, block.head, block.first);
}

}  // namespace foveal::cuda
