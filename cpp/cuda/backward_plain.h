// Backward in its plainest form: any dtype, any strides, every option. The path of float32 and float64, of arrays that
// the tensor-core path cannot load in 16-byte chunks, and of blocks that hold inf or NaN behind a mask.
//
// A block owns query rows and walks over the keys they see (dq), or owns keys of one key/value head and walks over the
// rows that see them, head after head of the group (dk, dv). The two are one routine with q, dout and k, v in exchanged
// roles:
//
//   owns        own1  own2    walked1  walked2    sums
//   rows        q     dout    k        v          dq = scale * sum ds k
//   keys        k     v       q        dout       dk = scale * sum ds q,  dv = sum w dout
//
// While dot products are made a lane is a walked row; while sums are made a lane is a column. Walked rows start at
// multiples of 32, so an element is summed in the same order whatever the block, batch and padding.
//
//   shared memory   [ own1 rows x D ][ own2 rows x Dv ][ walked: 32 x (max(D, Dv) + 1) ]  of Real
//
// Numerical contract: everything accumulates in Real, the result is rounded once; pairs of weight zero are left out.
#pragma once

#include "cuda/pair_gradient.h"
#include "cuda/plain.h"
#include "cuda/shape.h"

namespace foveal::cuda {

// dot[r] = own row (warp, r) . walked row `lane`, 0 where there is no such walked row.
template <class Config, class Real>
FOVEAL_DEVICE void multiply_rows(Real (&dot)[Config::kRowsPerWarp], const Real* own, int columns, const Real* walked,
                                 int pitch, int count) {
  constexpr int kR = Config::kRowsPerWarp;
  const int lane = lane_index();
  const Real* own_row = own + thread_index() / 32 * kR * columns;
#pragma unroll
  for (int r = 0; r < kR; ++r) dot[r] = Real(0);
  if (lane >= count) return;
  for (int d = 0; d < columns; ++d) {
    const Real element = walked[lane * pitch + d];
#pragma unroll
    for (int r = 0; r < kR; ++r) dot[r] = fused_multiply_add(own_row[r * columns + d], element, dot[r]);
  }
}

// sum[r][c] += factor[r] of walked row j * column (lane + 32c) of that row, for the rows of nonzero factor.
template <int kR, int kColumns, class Real>
FOVEAL_DEVICE void add_rows(Real (&sum)[kR][kColumns], const Real (&factor)[kR], const Real* walked, int pitch,
                            int count, int columns) {
  const int lane = lane_index();
  for (int j = 0; j < count; ++j) {
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const Real f = shuffle(factor[r], j);
      if (f == Real(0)) continue;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane + 32 * c < columns) sum[r][c] = fused_multiply_add(f, walked[j * pitch + lane + 32 * c], sum[r][c]);
      }
    }
  }
}

// Rows or keys [first_own, first_own + kRows) of one head (of queries, or of keys and values), by all threads.
template <class Config, bool kOwnsKeys>
FOVEAL_DEVICE void backward_plain_rows(const Params& p, const Span& span, int segment, int head, int first_own) {
  using Real = typename Config::Real;
  constexpr int kR = Config::kRowsPerWarp;
  constexpr int kColumns = kMaxHeadDim / 32;
  const Array& own1 = kOwnsKeys ? p.k : p.q;
  const Array& own2 = kOwnsKeys ? p.v : p.dout;
  const Array& walked1 = kOwnsKeys ? p.q : p.k;
  const Array& walked2 = kOwnsKeys ? p.dout : p.v;
  const Array& target = kOwnsKeys ? p.dk : p.dq;
  const int own_len = kOwnsKeys ? span.kv_len : span.q_len;
  const int own_extent = kOwnsKeys ? span.kv_extent : span.q_extent;
  const int own_begin = kOwnsKeys ? span.kv_begin : span.q_begin;
  const int walked_begin = kOwnsKeys ? span.q_begin : span.kv_begin;
  const int batch = span.batch;
  const int lane = lane_index();
  const int warp_row = thread_index() / 32 * kR;
  const int pitch = (p.head_dim > p.value_dim ? p.head_dim : p.value_dim) + 1;
  Real* shared1 = reinterpret_cast<Real*>(shared_memory());
  Real* shared2 = shared1 + Config::kRows * p.head_dim;
  Real* walked = shared2 + Config::kRows * p.value_dim;

  const int end_own = first_own + Config::kRows < own_len ? first_own + Config::kRows : own_len;
  int begin = 0, end = 0;
  if (end_own > first_own) {
    begin = (kOwnsKeys ? span.first_row(first_own) : span.first_key(first_own)) / kPlainKeys * kPlainKeys;
    end = kOwnsKeys ? span.end_row(end_own - 1) : span.end_key(end_own - 1);
  }

  block_barrier();  // shared memory may still hold what the caller did before
  if (end > begin) {
    stage_rows<Config>(shared1, p.head_dim, own1, offset_of(own1, batch, head, own_begin), first_own,
                       end_own - first_own, p.head_dim);
    stage_rows<Config>(shared2, p.value_dim, own2, offset_of(own2, batch, head, own_begin), first_own,
                       end_own - first_own, p.value_dim);
  }
  Real sum1[kR][kColumns] = {}, sum2[kR][kColumns] = {};
  for (int member = 0; member < (kOwnsKeys ? p.group : 1); ++member) {
    const int q_head = kOwnsKeys ? head * p.group + member : head;
    const int walked_head = kOwnsKeys ? q_head : head / p.group;
    const int64_t rows = row_start(p, span, segment, q_head);
    const ScorePolicy<Real> policy(p, batch, q_head);
    const auto stage = [&](const Array& a, int first, int count, int columns) {
      block_barrier();
      stage_rows<Config>(walked, pitch, a, offset_of(a, batch, walked_head, walked_begin), first, count, columns);
      block_barrier();
    };
    for (int first = begin; first < end; first += kPlainKeys) {
      const int count = end - first < kPlainKeys ? end - first : kPlainKeys;
      Real dot[kR], dp[kR];
      stage(walked1, first, count, p.head_dim);
      multiply_rows<Config>(dot, shared1, p.head_dim, walked, pitch, count);
      stage(walked2, first, count, p.value_dim);
      multiply_rows<Config>(dp, shared2, p.value_dim, walked, pitch, count);
      Real weight[kR], ds[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int own = first_own + warp_row + r;
        const int query = kOwnsKeys ? first + lane : own;
        const int key = kOwnsKeys ? own : first + lane;
        PairGradient<Real> g;
        if (own < end_own && lane < count) {
          g = differentiate(policy, span, query, key, dot[r], dp[r], static_cast<const Real*>(p.row_lse)[rows + query],
                            static_cast<const Real*>(p.row_delta)[rows + query]);
        }
        weight[r] = g.weight;
        ds[r] = g.score;
      }
      if constexpr (kOwnsKeys) add_rows(sum2, weight, walked, pitch, count, p.value_dim);
      stage(walked1, first, count, p.head_dim);
      add_rows(sum1, ds, walked, pitch, count, p.head_dim);
    }
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int own = first_own + warp_row + r;
    if (own >= own_extent) continue;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = lane + 32 * c;
      if (d < p.head_dim) {
        write_real(target, offset_of(target, batch, head, own_begin + own, d), sum1[r][c] * static_cast<Real>(p.scale));
      }
      if (kOwnsKeys && d < p.value_dim) write_real(p.dv, offset_of(p.dv, batch, head, own_begin + own, d), sum2[r][c]);
    }
  }
}

template <class Config, bool kOwnsKeys>
FOVEAL_DEVICE void backward_plain(const Params& p) {
  const Block block = locate_block<Config::kRows, kOwnsKeys>(p, kOwnsKeys ? p.num_kv_heads : p.num_heads, false);
  const Span span(p, block.segment);
  if (block.first < (kOwnsKeys ? span.kv_extent : span.q_extent)) {
    backward_plain_rows<Config, kOwnsKeys>(p, span, block.segment, block.head, block.first);
  }
}

}  // namespace foveal::cuda
