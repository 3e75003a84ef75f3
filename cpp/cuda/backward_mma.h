// Backward for 16-bit elements on sm_80 and later: mma.sync m16n8k16, cp.async, swizzled shared memory.
//
// Two launches of one routine (the roles of backward_plain.h): a block owns query rows and walks over keys for dq, or
// owns keys and walks over the query rows of every head of its group for dk and dv. Scores and dout . v are made
// twice, seven products a pair of blocks instead of the five that one launch would need; in exchange every gradient is
// summed by one thread in a fixed order: no atomics, no float32 copy of dq in memory, no block waits for another, and
// the bits are the same from run to run (Dao 2023, section 3.1, sums dq by atomics instead).
//
// An owned row is an A row in all products. So the accumulators of P and dS, 16 owned x 8 walked, already are the A
// operand of the sums, and warps that own different rows share nothing:
//
//   P = own1 walked1^T, dP = own2 walked2^T        multiply_qk; rows of own and walked tiles are contiguous in k
//   sum1 += dS walked1, sum2 += P walked2          multiply_pv; the walked tile through the transposing load
//
// Where both sums of 16 keys do not fit in a warp's registers (D = 256), kColumnParts warps own the same keys, each a
// part of the columns; they repeat the scores.
//
//   shared memory   [ own1 ][ own2 ] kOwned x D each, then 2 x [ walked1 ][ walked2 ][ lse ][ delta ]
//
// The next walked tiles travel while these are used; one barrier a step. Walked tiles start at multiples of kWalked, so
// an element is summed in the same order whatever the batch, heads, padding and window.
//
// A zero of P or dS times inf or NaN is NaN, so walked tiles that a mask cuts are searched for them. Where one is
// found, the block starts over on the plain path.
//
// Numerical contract: products and sums accumulate in float; P and dS are rounded to the element before they are
// multiplied, delta and the scale are not part of that rounding.
#pragma once

#include "cuda/backward_plain.h"
#include "cuda/product.h"

namespace foveal::cuda {

template <class Element_, int kHeadDim_, bool kOwnsKeys_, int kM_, int kWalked_, int kWarps_, int kColumnParts_>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // class: D and Dv are at most this, the rest is zeros
  static constexpr bool kOwnsKeys = kOwnsKeys_;
  static constexpr int kM = kM_;
  static constexpr int kWalked = kWalked_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kColumnParts = kColumnParts_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kOwned = backward_owned_rows(kM, kWarps, kColumnParts);
  static constexpr int kColumns = kHeadDim / kColumnParts;
  using OwnedTile = Tile<kOwned, kHeadDim>;
  using WalkedTile = Tile<kWalked, kHeadDim>;
  static_assert(kColumnParts == 1 || kColumns % 64 == 0);  // a part is whole swizzle groups
  static_assert(kRowPitch % kWalked == 0 && kWalked / 2 <= kThreads);
};

// One launch of the pair: from score = own1 . walked1 and dp to weights and ds, in place.
template <class Config, int kM, int kN>
class PairFragments {
 public:
  FOVEAL_DEVICE PairFragments(const Params& p, const Span& span, int batch)
      : p_(p),
        span_(span),
        batch_(batch),
        policies_(p.mask.data || p.bias.data || p.alibi_slopes.data || p.softcap > 0.0),
        scale_log2_(static_cast<float>(p.scale) * kLog2e) {}

  // Whether some pair of these rows and keys may be hidden.
  FOVEAL_DEVICE bool masked(int first_row, int end_row, int first_key, int end_key) const {
    return end_row > span_.q_len || p_.mask.data || p_.bias.data || first_key < span_.first_key(end_row - 1) ||
           end_key > span_.end_key(first_row);
  }

  // `own` is the lane's first owned row, `walked` its first walked one. lse and delta of an owned row are in
  // `own_rows`, of walked rows in shared memory.
  FOVEAL_DEVICE void differentiate_all(float (&score)[kM][kN][4], float (&dp)[kM][kN][4], int q_head, int own,
                                       int walked, const float (&own_rows)[kM][2][2], const float* walked_lse,
                                       const float* walked_delta, bool masked) const {
    const ScorePolicy<float> policy(p_, batch_, q_head);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = 2 * (lane_index() & 3) + 8 * n + odd;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& s = score[m][n][2 * half + odd];
            float& d = dp[m][n][2 * half + odd];
            const int owned = own + 16 * m + 8 * half;
            const int query = Config::kOwnsKeys ? walked + column : owned;
            const int key = Config::kOwnsKeys ? owned : walked + column;
            const float lse = Config::kOwnsKeys ? walked_lse[column] : own_rows[m][half][0];
            const float delta = Config::kOwnsKeys ? walked_delta[column] : own_rows[m][half][1];
            if (policies_) {
              const PairGradient<float> g = differentiate(policy, span_, query, key, s, d, lse, delta);
              s = g.weight;
              d = g.score;
            } else {
              const bool visible = !masked || span_.sees(query, key);
              const float weight = exp2_approx(fused_multiply_add(s, scale_log2_, -lse * kLog2e));
              s = visible ? weight : 0.0f;
              d = visible ? weight * (d - delta) : 0.0f;
            }
          }
        }
      }
    }
  }

 private:
  const Params& p_;
  const Span& span_;
  int batch_;
  bool policies_;
  float scale_log2_;
};

// Sums, times `factor`, into the warp's rows and columns of a tile of the block.
template <class Config, int kM, int kD>
FOVEAL_DEVICE void put_sums(uint32_t tile, int warp_row, int first_chunk, const float (&sum)[kM][kD][4], float factor) {
  using OwnedTile = typename Config::OwnedTile;
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        const int row = warp_row + 16 * m + 8 * half + lane / 4;
        shared_store_32(tile + OwnedTile::offset(row, first_chunk + d) + (lane % 4) * 4,
                        pack<typename Config::Element>(sum[m][d][2 * half] * factor, sum[m][d][2 * half + 1] * factor));
      }
}

template <class Config>
FOVEAL_DEVICE void backward_mma(const Params& p) {
  using Element = typename Config::Element;
  using OwnedTile = typename Config::OwnedTile;
  using WalkedTile = typename Config::WalkedTile;
  constexpr bool kOwnsKeys = Config::kOwnsKeys;
  constexpr int kOwned = Config::kOwned;
  constexpr int kWalked = Config::kWalked;
  constexpr int kThreads = Config::kThreads;
  constexpr int kM = Config::kM;
  constexpr int kN = kWalked / 8;
  constexpr int kD = Config::kColumns / 8;
  constexpr int kStageNbytes = 2 * WalkedTile::kNbytes + 2 * kWalked * 4;
  const Array& own1 = kOwnsKeys ? p.k : p.q;
  const Array& own2 = kOwnsKeys ? p.v : p.dout;
  const Array& walked1 = kOwnsKeys ? p.q : p.k;
  const Array& walked2 = kOwnsKeys ? p.dout : p.v;

  // Under a causal mask late rows see most keys and early keys are seen by most rows: those blocks start first.
  const Block block = locate_block<kOwned, kOwnsKeys>(p, kOwnsKeys ? p.num_kv_heads : p.num_heads, !kOwnsKeys);
  const Span span(p, block.segment);
  const int batch = span.batch;
  const int head = block.head;
  const int first_own = block.first;
  const int own_extent = kOwnsKeys ? span.kv_extent : span.q_extent;
  if (first_own >= own_extent) return;
  const int own_begin = kOwnsKeys ? span.kv_begin : span.q_begin;
  const int walked_begin = kOwnsKeys ? span.q_begin : span.kv_begin;
  const int own_len = kOwnsKeys ? span.kv_len : span.q_len;
  const int end_own = first_own + kOwned < own_len ? first_own + kOwned : own_len;
  int begin = 0, num_walked = 0;  // in tiles
  if (end_own > first_own) {
    begin = (kOwnsKeys ? span.first_row(first_own) : span.first_key(first_own)) / kWalked;
    const int end = kOwnsKeys ? span.end_row(end_own - 1) : span.end_key(end_own - 1);
    num_walked = end > begin * kWalked ? (end - begin * kWalked + kWalked - 1) / kWalked : 0;
  }
  const int num_steps = num_walked * (kOwnsKeys ? p.group : 1);

  const uint32_t own1_tile = shared_address(shared_memory());
  const uint32_t own2_tile = own1_tile + OwnedTile::kNbytes;
  const uint32_t stages = own2_tile + OwnedTile::kNbytes;
  const int warp = thread_index() / 32;
  const int warp_row = warp / Config::kColumnParts * 16 * kM;
  const int first_column = warp % Config::kColumnParts * Config::kColumns;
  const int lane_own = first_own + warp_row + lane_index() / 4;

  const auto q_head_of = [&](int step) { return kOwnsKeys ? head * p.group + step / num_walked : head; };
  const auto rows_of = [&](int q_head) { return row_start(p, span, block.segment, q_head); };
  const auto load_walked = [&](int step) {
    const uint32_t stage = stages + step % 2 * kStageNbytes;
    const int q_head = q_head_of(step);
    const int walked_head = kOwnsKeys ? q_head : head / p.group;
    const int first = (begin + step % num_walked) * kWalked;
    const int limit = kOwnsKeys ? span.q_len : span.kv_len;
    load_tile<WalkedTile, kThreads>(
        thread_index(), stage,
        static_cast<const Element*>(walked1.data) + offset_of(walked1, batch, walked_head, walked_begin),
        walked1.stride[2], first, limit, p.head_dim);
    load_tile<WalkedTile, kThreads>(
        thread_index(), stage + WalkedTile::kNbytes,
        static_cast<const Element*>(walked2.data) + offset_of(walked2, batch, walked_head, walked_begin),
        walked2.stride[2], first, limit, p.value_dim);
    if constexpr (kOwnsKeys) {
      if (thread_index() < kWalked / 2) {  // kWalked / 4 chunks of lse, as many of delta
        const int chunk = thread_index() % (kWalked / 4);
        const void* rows = thread_index() < kWalked / 4 ? p.row_lse : p.row_delta;
        cp_async_16(stage + 2 * WalkedTile::kNbytes + thread_index() * 16,
                    static_cast<const float*>(rows) + rows_of(q_head) + first + chunk * 4, true);
      }
    }
  };

  if (num_steps > 0) {
    load_tile<OwnedTile, kThreads>(thread_index(), own1_tile,
                                   static_cast<const Element*>(own1.data) + offset_of(own1, batch, head, own_begin),
                                   own1.stride[2], first_own, own_len, p.head_dim);
    load_tile<OwnedTile, kThreads>(thread_index(), own2_tile,
                                   static_cast<const Element*>(own2.data) + offset_of(own2, batch, head, own_begin),
                                   own2.stride[2], first_own, own_len, p.value_dim);
    load_walked(0);
    cp_async_commit();
  }
  float own_rows[kM][2][2] = {};
  if constexpr (!kOwnsKeys) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_own + 16 * m + 8 * half;
        const int64_t at = rows_of(head) + row;
        own_rows[m][half][0] = row < end_own ? static_cast<const float*>(p.row_lse)[at] : -negative_infinity();
        own_rows[m][half][1] = row < end_own ? static_cast<const float*>(p.row_delta)[at] : 0.0f;
      }
  }

  bool nonfinite = false;
  float sum1[kM][kD][4] = {}, sum2[kOwnsKeys ? kM : 1][kOwnsKeys ? kD : 1][4] = {};
  const PairFragments<Config, kM, kN> pairs(p, span, batch);
  for (int step = 0; step < num_steps; ++step) {
    const uint32_t tile1 = stages + step % 2 * kStageNbytes;
    const uint32_t tile2 = tile1 + WalkedTile::kNbytes;
    const int first = (begin + step % num_walked) * kWalked;
    const bool masked = kOwnsKeys ? pairs.masked(first, first + kWalked, first_own, first_own + kOwned)
                                  : pairs.masked(first_own, first_own + kOwned, first, first + kWalked);
    cp_async_wait<0>();
    // The walked tiles are here, and every warp is done with the ones before.
    if (masked) {
      bool found = own_chunks_nonfinite<Element, WalkedTile, kThreads>(thread_index(), tile1);
      if (kOwnsKeys) found |= own_chunks_nonfinite<Element, WalkedTile, kThreads>(thread_index(), tile2);
      nonfinite = block_barrier_or(found);
      if (nonfinite) break;
    } else {
      block_barrier();
    }
    if (step + 1 < num_steps) load_walked(step + 1);
    cp_async_commit();

    float score[kM][kN][4], dp[kM][kN][4];
    multiply_qk<Element, OwnedTile, WalkedTile>(score, own1_tile + warp_row * OwnedTile::kRowNbytes, tile1);
    multiply_qk<Element, OwnedTile, WalkedTile>(dp, own2_tile + warp_row * OwnedTile::kRowNbytes, tile2);
    const float* walked_rows = reinterpret_cast<const float*>(shared_memory() + (tile2 - own1_tile)) +
                               WalkedTile::kNbytes / static_cast<int>(sizeof(float));
    pairs.differentiate_all(score, dp, q_head_of(step), lane_own, first, own_rows, walked_rows, walked_rows + kWalked,
                            masked);
    if constexpr (kOwnsKeys) multiply_pv<Element, WalkedTile>(sum2, score, tile2 + first_column * 2);
    multiply_pv<Element, WalkedTile>(sum1, dp, tile1 + first_column * 2);
  }
  if (nonfinite) {
    using Plain = PlainConfig<float, Config::kWarps, 2>;
    static_assert(plain_backward_shared_nbytes(4, Plain::kRows, Config::kHeadDim, Config::kHeadDim) <=
                  backward_shared_nbytes(Config::kHeadDim, kOwned, kWalked));
    for (int own = first_own; own < first_own + kOwned && own < own_extent; own += Plain::kRows) {
      backward_plain_rows<Plain, kOwnsKeys>(p, span, block.segment, head, own);
    }
    return;
  }
  block_barrier();  // every warp is done with the owned tiles, whose place the sums take
  const Array& target = kOwnsKeys ? p.dk : p.dq;
  put_sums<Config>(own1_tile, warp_row, first_column / 8, sum1, static_cast<float>(p.scale));
  if constexpr (kOwnsKeys) put_sums<Config>(own2_tile, warp_row, first_column / 8, sum2, 1.0f);
  block_barrier();
  store_rows<OwnedTile, kThreads>(
      thread_index(), own1_tile, 0, kOwned,
      static_cast<Element*>(target.data) + offset_of(target, batch, head, own_begin + first_own), target.stride[2],
      own_extent - first_own, p.head_dim);
  if constexpr (kOwnsKeys) {
    store_rows<OwnedTile, kThreads>(
        thread_index(), own2_tile, 0, kOwned,
        static_cast<Element*>(p.dv.data) + offset_of(p.dv, batch, head, own_begin + first_own), p.dv.stride[2],
        own_extent - first_own, p.value_dim);
  }
}

}  // namespace foveal::cuda
