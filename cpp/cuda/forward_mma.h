// Forward for 16-bit elements on sm_80 and later: mma.sync m16n8k16, cp.async, swizzled shared memory.
//
// One block takes kBlockM query rows of one head and walks the visible keys in blocks of kBlockN, online softmax
// between (Dao 2023, FlashAttention-2: rows are split over warps, so no warp needs another's scores). K of the next
// block travels while the softmax and P V of this one run, V of this block while Q K^T runs; two barriers a block.
//
//   shared memory   [ Q kBlockM x D ][ K kBlockN x D ][ V kBlockN x D ]       Q's place takes the output at the end
//   warp w          query rows [w * kBlockM / kWarps, ...) of the block, all keys
//
// Key blocks start at multiples of kBlockN from key 0, and a block without visible keys changes nothing, so a row's
// bits depend on neither batch, heads, padding nor window start.
//
// A weight of zero times inf or NaN is NaN, so a V tile that a mask cuts is searched for them. Where one is found, the
// block starts over on the plain path, which leaves such keys out: rare, slow and right.
//
// Numerical contract: scores and output accumulate in float, weights are rounded to the element before P V, the sum is
// not.
#pragma once

#include "cuda/forward_plain.h"
#include "cuda/product.h"

namespace foveal::cuda {

template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, bool kPolicies_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // class: D and Dv are at most this, the rest is zeros
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kWarps = kWarps_;
  static constexpr bool kPolicies = kPolicies_;  // false: only lengths, causal and window, and a positive scale
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kM = kBlockM / (kWarps * 16);
  using QTile = Tile<kBlockM, kHeadDim>;
  using KTile = Tile<kBlockN, kHeadDim>;
};

// Normalises, includes the sink, and writes the block's rows and lse.
template <class Config, int kM, int kD>
FOVEAL_DEVICE void write_output(const Params& p, const Span& span, int batch, int head, int first_row, uint32_t tile,
                                float (&out)[kM][kD][4], const OnlineSoftmax<kM>& softmax, float scale_log2) {
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  const int lane = lane_index();
  const int warp_row = (thread_index() / 32) * 16 * kM;
  const float sink = p.sinks.data ? read_real<float>(p.sinks, offset_of(p.sinks, head)) : negative_infinity();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + lane / 4;
      const int query = first_row + row;
      const float sum = softmax.row_sum[m][half];
      RowEnd end{0.0f, negative_infinity()};
      if (query < span.q_len) {
        const float lse = sum != 0.0f
                              ? fused_multiply_add(softmax.row_max[m][half], scale_log2, log2_approx(sum)) * kLn2
                              : negative_infinity();
        end = include_sink(lse, sink);
        end.factor = sum != 0.0f ? divide(end.factor, sum) : 0.0f;
      }
      if (p.lse.data && query < span.q_extent && lane % 4 == 0) {
        static_cast<float*>(p.lse.data)[offset_of(p.lse, batch, head, span.q_begin + query)] = end.lse;
      }
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        shared_store_32(tile + QTile::offset(row, d) + (lane % 4) * 4,
                        pack<Element>(out[m][d][2 * half] * end.factor, out[m][d][2 * half + 1] * end.factor));
      }
    }
  }
  warp_barrier();  // a warp writes out only its own rows
  Element* target = static_cast<Element*>(p.out.data) + offset_of(p.out, batch, head, span.q_begin + first_row);
  store_rows<QTile, 32>(lane, tile, warp_row, 16 * kM, target, p.out.stride[2], span.q_extent - first_row, p.value_dim);
}

template <class Config>
FOVEAL_DEVICE void forward_mma(const Params& p) {
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  constexpr int kM = Config::kM;
  constexpr int kN = Config::kBlockN / 8;
  constexpr int kD = Config::kHeadDim / 8;

  // Blocks of one head follow each other, so that its K and V stay in L2; the long rows of a causal head come first.
  const Block block = locate_block<Config::kBlockM, false>(p, p.num_heads, true);
  const Span span(p, block.segment);
  const int batch = span.batch;
  const int head = block.head;
  const int kv_head = head / p.group;
  const int first_row = block.first;
  if (first_row >= span.q_extent) return;
  const int end_row = first_row + Config::kBlockM < span.q_len ? first_row + Config::kBlockM : span.q_len;
  const int block_begin = span.first_key(first_row) / Config::kBlockN;
  const int block_end = end_row > first_row ? (span.end_key(end_row - 1) + Config::kBlockN - 1) / Config::kBlockN : 0;

  const uint32_t q_tile = shared_address(shared_memory());
  const uint32_t k_tile = q_tile + QTile::kNbytes;
  const uint32_t v_tile = k_tile + KTile::kNbytes;
  const Element* q = static_cast<const Element*>(p.q.data) + offset_of(p.q, batch, head, span.q_begin);
  const Element* k = static_cast<const Element*>(p.k.data) + offset_of(p.k, batch, kv_head, span.kv_begin);
  const Element* v = static_cast<const Element*>(p.v.data) + offset_of(p.v, batch, kv_head, span.kv_begin);
  const uint32_t q_warp = q_tile + (thread_index() / 32) * 16 * kM * QTile::kRowNbytes;
  const int lane_row = first_row + (thread_index() / 32) * 16 * kM + lane_index() / 4;
  const auto query_of = [&](int m, int half) { return lane_row + 16 * m + 8 * half; };

  bool nonfinite = false;
  float out[kM][kD][4] = {};
  OnlineSoftmax<kM> softmax;
  const float scale_log2 = Config::kPolicies ? kLog2e : static_cast<float>(p.scale) * kLog2e;

  if (block_begin < block_end) {
    load_tile<QTile, Config::kThreads>(thread_index(), q_tile, q, p.q.stride[2], first_row, span.q_len, p.head_dim);
    load_tile<KTile, Config::kThreads>(thread_index(), k_tile, k, p.k.stride[2], block_begin * Config::kBlockN,
                                       span.kv_len, p.head_dim);
    cp_async_commit();
  }
  for (int key_block = block_begin; key_block < block_end; ++key_block) {
    const int first_key = key_block * Config::kBlockN;
    const bool masked = first_key < span.first_key(end_row - 1) ||
                        first_key + Config::kBlockN > span.end_key(first_row) ||
                        (Config::kPolicies && (p.mask.data || p.bias.data));
    cp_async_wait<0>();
    block_barrier();  // K is here, and every warp is done with the last V
    load_tile<KTile, Config::kThreads>(thread_index(), v_tile, v, p.v.stride[2], first_key, span.kv_len, p.value_dim);
    cp_async_commit();

    float score[kM][kN][4];
    multiply_qk<Element, QTile, KTile>(score, q_warp, k_tile);
    if constexpr (Config::kPolicies) {
      apply_policies(score, p, span, batch, first_key, query_of, [&](int, int) { return head; });
    } else if (masked) {
      mask_by_position(score, span, first_key, query_of);
    }

    cp_async_wait<0>();
    // V is here, and every warp is done with this K.
    if (masked) {
      nonfinite = block_barrier_or(own_chunks_nonfinite<Element, KTile, Config::kThreads>(thread_index(), v_tile));
      if (nonfinite) break;
    } else {
      block_barrier();
    }
    if (key_block + 1 < block_end) {
      load_tile<KTile, Config::kThreads>(thread_index(), k_tile, k, p.k.stride[2], first_key + Config::kBlockN,
                                         span.kv_len, p.head_dim);
    }
    cp_async_commit();
    softmax.update(score, out, scale_log2);
    multiply_pv<Element, KTile>(out, score, v_tile);
  }
  if (nonfinite) {
    using Plain = PlainConfig<float, Config::kWarps, kPlainRowsPerWarp>;
    static_assert(plain_shared_nbytes(4, Plain::kRows, Config::kHeadDim, Config::kHeadDim) <=
                  forward_shared_nbytes(Config::kHeadDim, Config::kBlockM, Config::kBlockN));
    for (int row = first_row; row < first_row + Config::kBlockM && row < span.q_extent; row += Plain::kRows) {
      forward_plain_rows<Plain>(p, span, head, row);
    }
    return;
  }
  softmax.finish();
  write_output<Config>(p, span, batch, head, first_row, q_tile, out, softmax, scale_log2);
}

}  // namespace foveal::cuda
