// What the driver hands to the kernels of one instruction set, and the table of those kernels. Plain data only: this
// header is read by code that is compiled for an instruction set the machine may not have.
#pragma once

#include <cstdint>

#include "foveal/normalizer.h"
#include "foveal/tensor_view.h"

namespace foveal {

constexpr int64_t kPositionLimit = int64_t{1}
                                   << 60;  // "no limit" for window sides, far from overflow when added to positions

// The rows of one (batch, key/value head) pair, and where its keys are. The query heads of a group share k and v, so a
// row is a (position i, head-in-group g) pair, interleaved:   row = i * group + g.   Strides are in elements.
struct HeadTask {
  const void* q;  // (Sq, group, D)
  int64_t q_stride_s, q_stride_g, q_stride_d;
  // Paged: k and v are those of page 0, and key j is row j % page_size of page pages[j / page_size].
  const int32_t* pages;  // null: not paged
  int64_t page_size, k_stride_page, v_stride_page;
  DType kv_dtype;                    // q's, or that of a cache of codes (kernels/stored.h)
  const float *k_scales, *v_scales;  // of codes: one a page of the sequence
  const void* k;                     // (Skv, D)
  int64_t k_stride_s, k_stride_d;
  const void* v;  // (Skv, Dv)
  int64_t v_stride_s, v_stride_d;
  void* out;  // (Sq, group, Dv)
  int64_t out_stride_s, out_stride_g, out_stride_d;
  int64_t head_dim, value_dim, group;
  int64_t kv_len;

  // Query i sits at position q_offset + i and sees the keys [position - window_left, position + window_right]; causal
  // is window_right = 0; kPositionLimit = unlimited.
  int64_t q_offset, window_left, window_right;
  // The same without what a span hides: how many keys a row counts (kernels/pointwise.inl.h).
  int64_t counted_left, counted_right;

  double scale;
  const double* additive;  // not null: scores are u . tanh(q + k) instead; u (group, D), scale 1
  double softcap;          // 0: none
  Normalizer normalizer;
  const double* slopes;             // ALiBi, one per head in the group; null: none
  const double* sinks;              // one per head in the group; null: none
  const double* gate_taus;          // one per row; null: none
  const double* gate_temperatures;  // with gate_taus: one per head in the group
  const double* spans;              // one per head in the group; null: none
  double span_ramp;

  const uint8_t* mask;  // null: none; (Sq, group, Skv)
  int64_t mask_stride_s, mask_stride_g, mask_stride_k;
  const void* bias;  // null: none; (Sq, group, Skv)
  DType bias_dtype;
  int64_t bias_stride_s, bias_stride_g, bias_stride_k;

  // Dropout: a pair's weight becomes 0 where its word is below the threshold, else it is multiplied by the scale.
  uint64_t dropout_threshold;  // of 2^32; 0: no dropout
  double dropout_scale;        // 0 where all is dropped
  uint64_t seed;
  uint32_t batch, q_head;  // of the first head of the group

  void* weights;  // null: not asked for; (Sq, group, Skv)
  int64_t weights_stride_s, weights_stride_g, weights_stride_k;
};

constexpr int64_t kMaxHeadsTogether = 8;

// The state of a row between blocks of keys, in the accumulator type (kernels/normalizer.inl.h): the largest score,
// in base 2, and the sum of 2^(score - max).
enum RowMember { kRowMax, kRowSum, kRowMembers };

// The statistics of a row (kernels/statistics.inl.h): the entropy of its weights in nats, what they sum to, the largest
// of them, and the threshold in the units of the normaliser's formula.
enum RowStat { kRowEntropy, kRowMass, kRowMaxWeight, kRowThreshold, kRowStats };

// Rows [row_begin, row_end) of a head over the keys [key_begin, key_end).
struct RowTask {
  const HeadTask* head;
  // For `decode`: so many heads from `head` on, of one sequence. Where there are several, the rows of their keys lie
  // side by side in memory, head by head without gaps, and so do those of their values.
  int64_t heads;
  int64_t rows_between_heads;  // from the results (row_state, partial) of a head to those of the next
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;

  // The state of the rows after the keys: member m of row_begin + r at row_state[m * member_stride + r].
  void* row_state;
  int64_t member_stride;
  // Not null: the unnormalised sums of weighted values go here, (rows, value_dim) in the accumulator type, instead of
  // the finished rows to `out`, for a later merge with other key ranges.
  void* partial;
  // Not null: the statistics of the rows (T), member m of row_begin + r at row_stats[m * stats_stride + r], where
  // whole vectors of rows have room; and the key of the largest weight, -1 where there is none. Not with `partial`.
  void* row_stats;
  int64_t stats_stride;
  int64_t* row_argmax;
  // T, not null: where the weights of every key are added up, over the rows, one row of kv_len a head of the group.
  void* key_mass;
  // The `top_k` heaviest keys of each row, -1 and 0 where there are fewer: of row_begin + r at [r * top_k].
  int64_t top_k;
  int64_t* top_keys;
  void* top_weights;  // T
  void* scratch;      // scratch_nbytes(), 64-byte aligned
};

// What the backward pass adds to a head. Rows that are numbered, not strided, are in the order of `row`; T is the
// accumulator type.
struct GradientHead {
  const HeadTask* head;
  const void* dout;  // (Sq, group, Dv), q's dtype
  int64_t dout_stride_s, dout_stride_g, dout_stride_d;
  // T, one a row each: what the normaliser's gradient reads (RowTerms in kernels/normalizer.inl.h). Of softmax, shift
  // is the log-sum-exp in base 2 (0 for a row that sees nothing) and delta is dout . out, less the gradient of the lse.
  void *shift, *threshold, *delta;
  // T, null: not asked for. The gradient of the row's entropy adds -(slope * log2 w + shift) to that of a weight w.
  void *entropy_slope, *entropy_shift;
  void* dq;  // (Sq, group, D), q's dtype
  int64_t dq_stride_s, dq_stride_g, dq_stride_d;
  void* dk;  // (Skv, D), q's dtype
  int64_t dk_stride_s, dk_stride_d;
  void* dv;  // (Skv, Dv), q's dtype
  int64_t dv_stride_s, dv_stride_d;
  void* dbias;  // T, null: not asked for; (Sq, group, Skv), added to; stride 0: an axis that is summed
  int64_t dbias_stride_s, dbias_stride_g, dbias_stride_k;
  // T, null: not asked for; member m of a row at [m * row_sums_stride + row].
  void* row_sums;
  int64_t row_sums_stride;
  void* additive_sums;  // T, with additive scores: what each row adds to the gradient of u, (rows, D)
};

// What the backward pass sums a row beside dq, over its keys: the gradients of the gate's threshold, of its temperature
// and of the span.
enum RowSum { kGateTauSum, kGateTemperatureSum, kSpanSum, kRowSums };

// The sums of a row, in elements: of dq, of the gradient of u with additive scores, and of the others where they are
// asked for.
inline int64_t sums_of_row(const GradientHead& g) {
  return g.head->head_dim * (g.head->additive != nullptr ? 2 : 1) + (g.row_sums != nullptr ? int64_t{kRowSums} : 0);
}

// Rows [row_begin, row_end) of a head against the keys [key_begin, key_end).
struct GradientTask {
  const GradientHead* grads;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  // T: the sums of these rows, transposed tile by tile. They start from 0 when `first`, and become dq and row_sums when
  // `last`.
  void* dq_sums;  // rows_per_tile * sums_of_row() for each tile
  bool first, last;
  void* key_sums;  // T: key_sums_width() for each key from key_begin on, added to
  void* scratch;   // backward_scratch_nbytes(), 64-byte aligned
};

struct RowKernels {
  int64_t rows_per_tile;  // the rows that one register tile covers
  int64_t decode_rows;    // up to so many rows of a head, `decode` is the faster
  int64_t
      rounding_rows;  // from so many on, `decode` rounds its weights to the stored type (value_pairs.inl.h); 0: never
  int64_t (*forward_scratch_nbytes)(const HeadTask&, int64_t rows);
  void (*forward)(const RowTask&);
  int64_t (*decode_scratch_nbytes)(const HeadTask&, int64_t heads);
  void (*decode)(const RowTask&);
  // Joins `parts` partial results of the same rows, in their order, writes the finished rows to head.out and the joined
  // state to row_state (whose members hold parts * rows values on entry, rows on return).
  void (*merge)(const RowTask&, int64_t parts);

  // The backward pass: the terms of the rows that the forward pass did not save, from `out` and `dout`, with scratch of
  // terms_scratch_nbytes; then, for ascending blocks of rows, their share of all
  // sums; then dk and dv of the keys.
  int64_t (*backward_scratch_nbytes)(const HeadTask&, int64_t rows);
  int64_t (*key_sums_width)(const HeadTask&);
  int64_t (*terms_scratch_nbytes)(const HeadTask&);
  void (*backward_terms)(const GradientTask&);
  void (*backward)(const GradientTask&);
  void (*backward_keys)(const GradientTask&);
  bool rounds_gradients;  // weights and gradients of scores, to the stored type before they are summed
};

struct KernelTable {
  const char* name;
  RowKernels float32, float64, float16, bfloat16;
};

}  // namespace foveal
