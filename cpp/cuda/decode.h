// Forward for few query rows (decoding, speculative steps): bound by reading K and V once, so all query rows that share
// a key/value head are packed into 16-row tiles and the keys are split over the chip (Flash-Decoding; Dao et al. 2023).
//
//   packed row r of key/value head h:  query r / group, head h * group + r % group
//   split s:                           keys [s * kSplitKeys, (s + 1) * kSplitKeys)
//   warp w of a block:                 the split's 16-key tiles w, w + kWarps, ...
//
// Warps share nothing while they stream: each has its own ring of kStages K and V tiles, its own softmax and its own
// output, so the loop has no block barrier. They merge through shared memory at the end; splits merge in
// `combine_splits`.
//
// The split length is a constant and its boundaries lie at fixed keys: a row's bits depend on neither batch, heads nor
// padding. Splits that see no key write lse = -inf and nothing else. One split or many, the same arithmetic runs in the
// same order.
#pragma once

#include "cuda/product.h"
#include "cuda/score.h"
#include "cuda/shape.h"

namespace foveal::cuda {

template <class Element_, int kHeadDim_, int kWarps_, int kStages_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = kWarps * 32;
  using QTile = Tile<kPackedRows, kHeadDim>;
  using KTile = Tile<kWarpKeys, kHeadDim>;
};

// out += weight * V leaving out keys of weight zero, so that inf or NaN behind a mask cannot reach the result as 0 *
// NaN.
template <class Element, class VTile, int kN, int kD>
FOVEAL_DEVICE void multiply_pv_guarded(float (&out)[1][kD][4], const float (&weight)[1][kN][4], const char* v) {
  const int quad = lane_index() & ~3;
  const int column = 2 * (lane_index() & 3);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll 1
    for (int owner = 0; owner < 4; ++owner) {  // the lane of the quad that holds keys 8n + 2*owner, + 1
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Element rounded;
        rounded.bits = static_cast<uint16_t>(pack<Element>(weight[0][n][i], 0.0f));
        const float w = shuffle(widen(rounded), quad + owner);
        const int key = 8 * n + 2 * owner + i % 2;
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          const Element* value = reinterpret_cast<const Element*>(v + VTile::offset(key, d)) + column;
          float* o = out[0][d] + i / 2 * 2;
          if (w != 0.0f) {
            o[0] = fused_multiply_add(w, widen(value[0]), o[0]);
            o[1] = fused_multiply_add(w, widen(value[1]), o[1]);
          }
        }
      }
    }
  }
}

// kWarpKeys keys (or values) of a paged cache, by one warp: from one page where pages are whole tiles, else row by row.
template <class Element, class KTile>
FOVEAL_DEVICE void load_paged_tile(int lane, uint32_t tile, const Params& p, const Array& a, int batch, int kv_head,
                                   int first_key, int key_limit, int num_columns) {
  const Element* data = static_cast<const Element*>(a.data);
  if (p.page_size % kWarpKeys == 0) {
    const Element* source = data + key_offset(p, a, batch, kv_head, first_key);
    load_tile<KTile, 32>(lane, tile, source, a.stride[2], 0, key_limit - first_key, num_columns);
    return;
  }
  for (int i = lane; i < kWarpKeys * KTile::kChunks; i += 32) {
    const int row = i / KTile::kChunks;
    const int chunk = i % KTile::kChunks;
    const bool valid = first_key + row < key_limit && chunk * 8 < num_columns;
    const int64_t source = valid ? key_offset(p, a, batch, kv_head, first_key + row) + chunk * 8 : 0;
    cp_async_16(tile + KTile::offset(row, chunk), data + source, valid);
  }
}

// A finished row: normalised output element `value` at column d, and at column 0 the lse, with the sink included.
template <class Element>
FOVEAL_DEVICE void write_row(const Params& p, int batch, int head, int query, int d, float value, RowEnd end) {
  Element element;
  element.bits = static_cast<uint16_t>(pack<Element>(value * end.factor, 0.0f));
  static_cast<Element*>(p.out.data)[offset_of(p.out, batch, head, query) + d] = element;
  if (d == 0 && p.lse.data) static_cast<float*>(p.lse.data)[offset_of(p.lse, batch, head, query)] = end.lse;
}

FOVEAL_DEVICE float sink_of(const Params& p, int head) {
  return p.sinks.data ? read_real<float>(p.sinks, offset_of(p.sinks, head)) : negative_infinity();
}

template <class Config>
FOVEAL_DEVICE void decode(const Params& p) {
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using KTile = typename Config::KTile;
  constexpr int kD = Config::kHeadDim / 8;
  constexpr int kSteps = Config::kHeadDim / 16;
  constexpr int kStages = Config::kStages;

  // Row tiles of one split follow each other, so that they meet its keys in L2.
  const int num_rows = p.seqlen_q * p.group;
  const int num_row_tiles = (num_rows + kPackedRows - 1) / kPackedRows;
  int index = block_index_x();
  const int first_packed = index % num_row_tiles * kPackedRows;
  index /= num_row_tiles;
  const int split = index % p.num_splits;
  index /= p.num_splits;
  const int kv_head = index % p.num_kv_heads;
  const int batch = index / p.num_kv_heads;

  const Span span(p, batch);
  const int warp = thread_index() / 32;
  const int lane = lane_index();
  const int last_packed = first_packed + kPackedRows < num_rows ? first_packed + kPackedRows - 1 : num_rows - 1;
  const int first_query = first_packed / p.group;
  const int last_query = last_packed / p.group < span.q_len ? last_packed / p.group : span.q_len - 1;
  const auto query_of = [&](int, int half) {
    const int packed = first_packed + lane / 4 + 8 * half;
    return packed <= last_packed ? packed / p.group : span.q_len;  // past the rows: as a padded query
  };
  const auto head_of = [&](int, int half) {
    return kv_head * p.group + (first_packed + lane / 4 + 8 * half) % p.group;
  };

  // The visible keys of this split, on tile boundaries.
  const int split_begin = split * kSplitKeys;
  const int begin = span.first_key(first_query) > split_begin ? span.first_key(first_query) : split_begin;
  const int visible_end = last_query >= first_query ? span.end_key(last_query) : 0;
  const int end = visible_end < split_begin + kSplitKeys ? visible_end : split_begin + kSplitKeys;
  const int tile_begin = begin / kWarpKeys;
  const int tile_end = end > begin ? (end + kWarpKeys - 1) / kWarpKeys : tile_begin;

  const uint32_t q_tile = shared_address(shared_memory());
  const uint32_t ring = q_tile + QTile::kNbytes + warp * kStages * 2 * KTile::kNbytes;
  const Element* k = static_cast<const Element*>(p.k.data) + offset_of(p.k, batch, kv_head);
  const Element* v = static_cast<const Element*>(p.v.data) + offset_of(p.v, batch, kv_head);

  // Tiles belong to warps by their place in the split, whichever of them are visible.
  const int first_tile = split_begin / kWarpKeys;
  const int skipped = tile_begin - first_tile - warp;
  const int my_first =
      first_tile + warp + (skipped > 0 ? (skipped + Config::kWarps - 1) / Config::kWarps * Config::kWarps : 0);
  const auto load = [&](int tile, int stage) {
    if (tile < tile_end) {
      const uint32_t k_tile = ring + stage * 2 * KTile::kNbytes;
      const int first = tile * kWarpKeys;
      if (p.block_table.data) {
        load_paged_tile<Element, KTile>(lane, k_tile, p, p.k, batch, kv_head, first, span.kv_len, p.head_dim);
        load_paged_tile<Element, KTile>(lane, k_tile + KTile::kNbytes, p, p.v, batch, kv_head, first, span.kv_len,
                                        p.value_dim);
      } else {
        load_tile<KTile, 32>(lane, k_tile, k, p.k.stride[2], first, span.kv_len, p.head_dim);
        load_tile<KTile, 32>(lane, k_tile + KTile::kNbytes, v, p.v.stride[2], first, span.kv_len, p.value_dim);
      }
    }
    cp_async_commit();
  };

  for (int i = thread_index(); i < kPackedRows * QTile::kChunks; i += Config::kThreads) {
    const int row = i / QTile::kChunks;
    const int chunk = i % QTile::kChunks;
    const int packed = first_packed + row;
    const int query = packed / p.group;
    const int head = kv_head * p.group + packed % p.group;
    const Element* source = static_cast<const Element*>(p.q.data) + offset_of(p.q, batch, head, query) + chunk * 8;
    cp_async_16(q_tile + QTile::offset(row, chunk), source,
                packed <= last_packed && query < span.q_len && chunk * 8 < p.head_dim);
  }
  cp_async_commit();
  for (int stage = 0; stage < kStages - 1; ++stage) load(my_first + stage * Config::kWarps, stage);
  cp_async_wait<kStages - 1>();
  block_barrier();
  uint32_t a[kSteps][4];
  const uint32_t lane_q = lane_address_a<QTile>(q_tile);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) ldmatrix_x4(a[step], QTile::advance(lane_q, step));

  const bool policies = p.mask.data || p.bias.data || p.alibi_slopes.data || p.softcap > 0.0 || p.scale <= 0.0;
  const float scale_log2 = policies ? kLog2e : static_cast<float>(p.scale) * kLog2e;
  float out[1][kD][4] = {};
  OnlineSoftmax<1> softmax;
  int stage = 0;
  for (int tile = my_first; tile < tile_end; tile += Config::kWarps) {
    cp_async_wait<kStages - 2>();
    warp_barrier();  // the tile is here, and all lanes are done with the last one
    load(tile + (kStages - 1) * Config::kWarps, (stage + kStages - 1) % kStages);
    const uint32_t k_tile = ring + stage * 2 * KTile::kNbytes;
    const uint32_t v_tile = k_tile + KTile::kNbytes;

    float score[1][2][4] = {};
    const uint32_t lane_k = lane_address_b<KTile>(k_tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      ldmatrix_x4(b, KTile::advance(lane_k, step));
      mma_m16n8k16<Element>(score[0][0], a[step], b[0], b[1]);
      mma_m16n8k16<Element>(score[0][1], a[step], b[2], b[3]);
    }
    const int first_key = tile * kWarpKeys;
    const bool masked = first_key < span.first_key(last_query) || first_key + kWarpKeys > span.end_key(first_query);
    if (policies) {
      apply_policies(score, p, span, batch, first_key, query_of, head_of);
    } else if (masked) {
      mask_by_position(score, span, first_key, query_of);
    }
    softmax.update(score, out, scale_log2);
    if ((masked || p.mask.data || p.bias.data) && warp_any(own_chunks_nonfinite<Element, KTile, 32>(lane, v_tile))) {
      multiply_pv_guarded<Element, KTile>(out, score, shared_memory() + (v_tile - q_tile));
    } else {
      multiply_pv<Element, KTile>(out, score, v_tile);
    }
    stage = (stage + 1) % kStages;
  }
  softmax.finish();

  // Merge the warps: (maximum in log2 units, sum) and output of each row.
  cp_async_wait<0>();
  block_barrier();
  float* merge_out = reinterpret_cast<float*>(shared_memory() + QTile::kNbytes);
  float* merge_max = merge_out + Config::kWarps * kPackedRows * Config::kHeadDim;
  float* merge_sum = merge_max + Config::kWarps * kPackedRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kPackedRows + lane / 4 + 8 * half;
#pragma unroll
    for (int d = 0; d < kD; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        merge_out[row * Config::kHeadDim + 8 * d + 2 * (lane % 4) + i] = out[0][d][2 * half + i];
    }
    if (lane % 4 == 0) {
      merge_max[row] = softmax.row_max[0][half] * scale_log2;
      merge_sum[row] = softmax.row_sum[0][half];
    }
  }
  block_barrier();
  for (int i = thread_index(); i < kPackedRows * Config::kHeadDim; i += Config::kThreads) {
    const int row = i / Config::kHeadDim;
    const int d = i % Config::kHeadDim;
    const int packed = first_packed + row;
    if (packed > last_packed || d >= p.value_dim) continue;
    const int query = packed / p.group;
    const int head = kv_head * p.group + packed % p.group;
    float top = negative_infinity();
    for (int w = 0; w < Config::kWarps; ++w) top = maximum(top, merge_max[w * kPackedRows + row]);
    float sum = 0.0f, value = 0.0f;
    if (top != negative_infinity() && query < span.q_len) {
      for (int w = 0; w < Config::kWarps; ++w) {
        const int r = w * kPackedRows + row;
        const float factor = exp2_approx(merge_max[r] - top);
        sum = fused_multiply_add(factor, merge_sum[r], sum);
        value = fused_multiply_add(factor, merge_out[r * Config::kHeadDim + d], value);
      }
    }
    const float lse = sum != 0.0f ? (top + log2_approx(sum)) * kLn2 : negative_infinity();
    if (sum != 0.0f) value = divide(value, sum);
    if (p.num_splits > 1) {
      const int64_t out_row =
          ((static_cast<int64_t>(split) * p.batch + batch) * p.num_heads + head) * p.seqlen_q + query;
      if (sum != 0.0f) p.partial_out[out_row * p.value_dim + d] = value;
      if (d == 0) p.partial_lse[out_row] = lse;
    } else {
      const RowEnd row_end =
          query < span.q_len ? include_sink(lse, sink_of(p, head)) : RowEnd{0.0f, negative_infinity()};
      write_row<Element>(p, batch, head, query, d, value, row_end);
    }
  }
}

// One warp merges the splits of one row: out = sum_s 2^(lse_s - max) out_s / sum_s 2^(lse_s - max), in the order of s.
template <class Element>
FOVEAL_DEVICE void combine_splits(const Params& p, int rows_per_block) {
  const int lane = lane_index();
  const int64_t num_rows = static_cast<int64_t>(p.batch) * p.num_heads * p.seqlen_q;
  const int64_t row = static_cast<int64_t>(block_index_x()) * rows_per_block + thread_index() / 32;
  if (row >= num_rows) return;
  const int query = static_cast<int>(row % p.seqlen_q);
  const int head = static_cast<int>(row / p.seqlen_q % p.num_heads);
  const int batch = static_cast<int>(row / p.seqlen_q / p.num_heads);

  float top = negative_infinity();
  for (int s = 0; s < p.num_splits; ++s) top = maximum(top, p.partial_lse[s * num_rows + row]);
  float total = 0.0f;
  if (top != negative_infinity()) {
    for (int s = 0; s < p.num_splits; ++s) total += exp2_approx((p.partial_lse[s * num_rows + row] - top) * kLog2e);
  }
  const Span span(p, batch);
  const float lse = total != 0.0f ? fused_multiply_add(log2_approx(total), kLn2, top) : negative_infinity();
  const RowEnd end = query < span.q_len ? include_sink(lse, sink_of(p, head)) : RowEnd{0.0f, negative_infinity()};
  for (int d = lane; d < p.value_dim; d += 32) {
    float value = 0.0f;
    for (int s = 0; s < p.num_splits; ++s) {
      const float split_lse = p.partial_lse[s * num_rows + row];
      if (split_lse == negative_infinity()) continue;  // that split wrote no output
      value = fused_multiply_add(exp2_approx((split_lse - top) * kLog2e),
                                 p.partial_out[(s * num_rows + row) * p.value_dim + d], value);
    }
    write_row<Element>(p, batch, head, query, d, total != 0.0f ? divide(value, total) : 0.0f, end);
  }
}

}  // namespace foveal::cuda
