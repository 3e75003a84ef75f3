// The gradient of the bias: db of every pair, summed over the axes along which the bias is broadcast (stride 0 in
// dbias).
//
// A block owns kRows x 32 elements of dbias, or as many as are left of a broadcast axis, and walks over every pair that
// adds to them, in a fixed order (packed sequences have no bias here): no two blocks write the same element and none
// waits for another. It computes its scores anew, by the plain routine for every dtype: a bias that wants a gradient is
// rare next to one that does not.
//
//   shared memory   [ q kRows x D ][ dout kRows x Dv ][ keys, then values: 32 x (max(D, Dv) + 1) ]; at the end the sums
#pragma once

#include "cuda/backward_plain.h"

namespace foveal::cuda {

struct BiasGrid {
  bool summed[4];  // axes of stride 0
  int batches, heads, row_blocks, key_blocks;

  FOVEAL_DEVICE BiasGrid(const Params& p, int rows) {
    for (int i = 0; i < 4; ++i) summed[i] = p.dbias.stride[i] == 0;
    batches = summed[0] ? 1 : p.batch;
    heads = summed[1] ? 1 : p.num_heads;
    row_blocks = summed[2] ? 1 : (p.seqlen_q + rows - 1) / rows;
    key_blocks = summed[3] ? 1 : (p.seqlen_kv + kPlainKeys - 1) / kPlainKeys;
  }
};

template <class Config>
FOVEAL_DEVICE void differentiate_bias(const Params& p) {
  using Real = typename Config::Real;
  constexpr int kR = Config::kRowsPerWarp;
  constexpr int kRows = Config::kRows;
  const BiasGrid grid(p, kRows);
  int index = block_index_x();
  const int own_keys = index % grid.key_blocks * kPlainKeys;
  index /= grid.key_blocks;
  const int own_rows = index % grid.row_blocks * kRows;
  index /= grid.row_blocks;
  const int own_head = index % grid.heads;
  const int own_batch = index / grid.heads;

  const int lane = lane_index();
  const int warp_row = thread_index() / 32 * kR;
  const int pitch = (p.head_dim > p.value_dim ? p.head_dim : p.value_dim) + 1;
  Real* q = reinterpret_cast<Real*>(shared_memory());
  Real* dout = q + kRows * p.head_dim;
  Real* walked = dout + kRows * p.value_dim;

  Real sum[kR] = {};
  const int end_batch = grid.summed[0] ? p.batch : own_batch + 1;
  const int end_head = grid.summed[1] ? p.num_heads : own_head + 1;
  const int end_row = grid.summed[2] ? p.seqlen_q : own_rows + 1;
  const int end_key = grid.summed[3] ? p.seqlen_kv : own_keys + 1;
  for (int batch = own_batch; batch < end_batch; ++batch) {
    const Span span(p, batch);
    for (int head = own_head; head < end_head; ++head) {
      const int kv_head = head / p.group;
      const int64_t rows = row_start(p, span, batch, head);
      const ScorePolicy<Real> policy(p, batch, head);
      for (int row = own_rows; row < end_row; row += kRows) {
        const int num_rows = span.q_len - row < kRows ? span.q_len - row : kRows;
        if (num_rows <= 0) continue;
        block_barrier();
        stage_rows<Config>(q, p.head_dim, p.q, offset_of(p.q, batch, head), row, num_rows, p.head_dim);
        stage_rows<Config>(dout, p.value_dim, p.dout, offset_of(p.dout, batch, head), row, num_rows, p.value_dim);
        for (int key = own_keys; key < end_key; key += kPlainKeys) {
          const int count = span.kv_len - key < kPlainKeys ? span.kv_len - key : kPlainKeys;
          if (count <= 0 || key >= span.end_key(row + num_rows - 1) || key + count <= span.first_key(row)) continue;
          Real dot[kR], dp[kR];
          block_barrier();
          stage_rows<Config>(walked, pitch, p.k, offset_of(p.k, batch, kv_head), key, count, p.head_dim);
          block_barrier();
          multiply_rows<Config>(dot, q, p.head_dim, walked, pitch, count);
          block_barrier();
          stage_rows<Config>(walked, pitch, p.v, offset_of(p.v, batch, kv_head), key, count, p.value_dim);
          block_barrier();
          multiply_rows<Config>(dp, dout, p.value_dim, walked, pitch, count);
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            const int query = row + warp_row + r;
            if (query >= row + num_rows || lane >= count) continue;
            const PairGradient<Real> g = differentiate(policy, span, query, key + lane, dot[r], dp[r],
                                                       static_cast<const Real*>(p.row_lse)[rows + query],
                                                       static_cast<const Real*>(p.row_delta)[rows + query]);
            sum[r] += g.bias;
          }
        }
      }
    }
  }

  block_barrier();
  Real* sums = q;  // kRows x 32
#pragma unroll
  for (int r = 0; r < kR; ++r) sums[(warp_row + r) * kPlainKeys + lane] = sum[r];
  block_barrier();
  const int num_rows = grid.summed[2] ? 1 : p.seqlen_q - own_rows < kRows ? p.seqlen_q - own_rows : kRows;
  const int num_keys = grid.summed[3] ? 1 : p.seqlen_kv - own_keys < kPlainKeys ? p.seqlen_kv - own_keys : kPlainKeys;
  for (int i = thread_index(); i < num_rows * num_keys; i += Config::kThreads) {
    const int row = i / num_keys;
    const int key = i % num_keys;
    Real total = Real(0);
    for (int r = row; r < (grid.summed[2] ? kRows : row + 1); ++r) {
      for (int j = key; j < (grid.summed[3] ? kPlainKeys : key + 1); ++j) total += sums[r * kPlainKeys + j];
    }
    write_real(p.dbias, offset_of(p.dbias, own_batch, own_head, own_rows + row, own_keys + key), total);
  }
}

}  // namespace foveal::cuda
