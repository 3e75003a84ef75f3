// The forward kernel for few rows (decoding): head dimensions in the vector lanes.
//
// With one query and thousands of keys the work is reading K and V once, so every row of the head (the query group of
// GQA included) goes with each key while that is in registers, stored halves and codes are widened there
// (decode_products.inl.h), and nothing is packed.
//
// Caches keep the heads of a token side by side, and a head's own rows are then a few hundred bytes here and there. So
// the heads of a task go through the keys together, block by block: the weights of all heads, then the values of all
// heads, each phase asking for what the next one reads in the order of memory (ahead.inl.h). What a head computes does
// not depend on the others.
//
// Same normaliser and the same block boundaries as the forward tile. A long key range is cut by the plan into parts
// that merge.inl.h joins in order.
#pragma once

#include "kernels/ahead.inl.h"
#include "kernels/arena.inl.h"
#include "kernels/base2.inl.h"
#include "kernels/bfloat16_products.inl.h"
#include "kernels/decode_products.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/key_rows.inl.h"
#include "kernels/lanes.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/normalizer.inl.h"
#include "kernels/score_policy.inl.h"
#include "kernels/storage.inl.h"
#include "kernels/stored.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

template <class V>
constexpr int64_t kDecodeRows = V::kLanes < 8 ? V::kLanes : 8;

template <class V, int R>
struct DecodeState {
  int64_t row_begin, rows;
  typename V::T *q, *o, *s;
  int64_t q_stride, o_stride;
  V unit;                    // lane l: what the products of row l % R with keys are in
  RowState<V, 1> row_state;  // lane l: of row l % R; sums over the keys that fell to this lane

  // Of the block at hand: what its keys do to the sums so far, and who sees them.
  V rescale;
  Visibility seen;
};

// Whether some weights of a block are those of keys that must not reach the output.
FOVEAL_INLINE bool hides_keys(const HeadTask& h, Visibility seen) {
  return seen == Visibility::kPartial || hides_zero_weights(h.normalizer);
}

// The scores of keys [begin, begin + n), all policies applied, their per-lane maxima in `highest`.
template <class V, class S, int R, class C>
static Visibility decode_block_scores(const HeadTask& h, const DecodeState<V, R>& state, int64_t begin, int64_t n,
                                      const Rows<C>& k, Ahead<C>& ahead, V& highest) {
  using T = typename V::T;
  uint64_t bits[kKeyBlock + V::kLanes];
  const Visibility seen = visible_bits(h, state.row_begin, state.rows, begin, n, bits);
  highest = negative_infinity<V>();
  if (seen == Visibility::kNone) return seen;
  T* s = state.s;
  decode_scores<V, typename Products<V, S>::template FewRowsScore<C, R>, R>(state.q, state.q_stride, h.head_dim,
                                                                            state.unit, k, n, s, ahead);
  if constexpr (Stored<C>::kScaled) multiply_by_page<V, R>(h, h.k_scales, begin, n, s);

  const KeyLanes<V, R> lanes{state.row_begin, state.rows};
  const int64_t padded = lanes.steps(n) * lanes.kKeys;  // the block's last vector may reach past its keys
  for (int64_t j = n; j < padded; ++j) {
    bits[j] = 0;
    for (int r = 0; r < R; ++r) s[j * R + r] = -static_cast<T>(__builtin_inf());
  }
  apply_policies<V>(h, lanes, begin, n, s);
  const bool masked = seen == Visibility::kPartial || padded != n;
  if (seen == Visibility::kFull && masked)
    for (int64_t j = 0; j < n; ++j) bits[j] = ~uint64_t{0};
  apply_mask<V>(lanes, masked ? bits : nullptr, n, s,
                [&](int64_t, int, V score) __attribute__((always_inline)) { highest = max(highest, score); });
  return seen;
}

// From the scores of a block to its weights, in state.s.
template <class V, class S, int R, class C>
static void decode_weights(const HeadTask& h, DecodeState<V, R>& state, int64_t begin, int64_t n, const Rows<C>& k,
                           Ahead<C>& ahead) {
  V highest;
  state.seen = decode_block_scores<V, S, R>(h, state, begin, n, k, ahead, highest);
  if (state.seen == Visibility::kNone) return;
  const V highest_of[1] = {over_keys<V, R>(highest, [](auto x, auto y) { return x > y ? x : y; })};
  const int64_t steps = KeyLanes<V, R>::steps(n);
  V rescale[1];
  with_normalizer(
      h, [&]<class N>(N) { N::step(state.row_state, state.s, steps, highest_of, rescale, hides_keys(h, state.seen)); });
  state.rescale = rescale[0];
  if constexpr (Stored<C>::kScaled) multiply_by_page<V, R>(h, h.v_scales, begin, n, state.s);
}

template <class V, class S, int R, class C>
static void decode_add_values(const HeadTask& h, const DecodeState<V, R>& state, int64_t n, const Rows<C>& v,
                              Ahead<C>& ahead) {
  if (state.seen == Visibility::kNone) return;
  alignas(64) typename V::T rescale[V::kLanes];
  store(rescale, state.rescale);
  if constexpr (!Stored<C>::kFinite) {
    if (hides_keys(h, state.seen) && !all_finite<V>(v, n, h.value_dim))
      return decode_values_guarded<V, R>(state.s, n, v, h.value_dim, state.o, state.o_stride, rescale);
  }
  using Pairs = typename Products<V, S>::template FewRowsValue<C, R>;
  if constexpr (__is_same(Pairs, void))
    decode_values<V, R>(state.s, n, v, h.value_dim, state.o, state.o_stride, rescale, ahead);
  else
    decode_paired_values<Pairs, R, kDecodeAccumulators / R / 2>(state.s, n, v, h.value_dim, state.o, state.o_stride,
                                                                rescale, ahead);
}

template <class V>
static int64_t decode_scratch_nbytes(const HeadTask& h, int64_t heads) {
  const int64_t head =
      kDecodeRows<V> * (round_up(h.head_dim, V::kLanes) + round_up(h.value_dim, V::kLanes) + kKeyBlock) +
      3 * 64 / static_cast<int64_t>(sizeof(typename V::T));
  const int64_t packed = kKeyBlock * (h.head_dim + h.value_dim);
  return round_up((heads * head + packed) * static_cast<int64_t>(sizeof(typename V::T)) + 2 * 64, 64);
}

template <class V, class Dot, class S, int R>
static void begin_decode(const RowTask& task, const HeadTask& h, Arena<typename V::T>& arena,
                         DecodeState<V, R>& state) {
  using T = typename V::T;
  state.row_begin = task.row_begin;
  state.rows = task.row_end - task.row_begin;
  state.q_stride = round_up(h.head_dim, Dot::kChunk) / Dot::kChunk * V::kLanes;
  state.o_stride = round_up(h.value_dim, V::kLanes);
  state.q = arena.take(R * state.q_stride);
  state.o = arena.take(R * state.o_stride);
  state.s = arena.take(R * kKeyBlock);
  alignas(64) T unit[V::kLanes], row_state[kRowMembers * V::kLanes];
  for (int64_t r = 0; r < R; ++r) {
    const int64_t row = task.row_begin + r;
    T* to = state.q + r * state.q_stride;
    unit[r] = 0;
    if (r < state.rows) {
      const S* q = static_cast<const S*>(h.q) + row / h.group * h.q_stride_s + row % h.group * h.q_stride_g;
      unit[r] = Dot::load_row(q, h.q_stride_d, h.head_dim, score_scale<V>(h), to);
    } else {
      for (int64_t x = 0; x < state.q_stride; x += V::kLanes) store(to + x, zero<V>());
    }
    for (int64_t c = 0; c < state.o_stride; c += V::kLanes) store(state.o + r * state.o_stride + c, zero<V>());
    with_normalizer(h, [&]<class N>(N) { N::begin(h, row, task.partial == nullptr, row_state + r, V::kLanes); });
  }
  // What a row begins with counts once, in the lane of its first key.
  with_normalizer(h, [&]<class N>(N) {
    for (int lane = R; lane < V::kLanes; ++lane) {
      unit[lane] = unit[lane % R];
      for (T* member = row_state; member < row_state + kRowMembers * V::kLanes; member += V::kLanes)
        member[lane] = N::kSumsOverLanes[(member - row_state) / V::kLanes] ? T{0} : member[lane % R];
    }
  });
  state.unit = load(unit);
  state.row_state = RowState<V, 1>::read(row_state, V::kLanes);
}

// `first_result` is where the results of this head's rows are among those of the task.
template <class V, class S, int R>
static void finish_decode(const RowTask& task, const HeadTask& h, int64_t first_result,
                          const DecodeState<V, R>& state) {
  using T = typename V::T;
  RowState<V, 1> joined = state.row_state;
  alignas(64) T row_state[kRowMembers * V::kLanes], scale[V::kLanes];
  with_normalizer(h, [&]<class N>(N) {
    for (int m = 0; m < kRowMembers; ++m)
      if (N::kSumsOverLanes[m])
        joined.of[m][0] = over_keys<V, R>(joined.of[m][0], [](auto x, auto y) { return x + y; });
    store(scale, N::scale(joined, 0));
  });
  joined.write(row_state, V::kLanes);
  for (int64_t r = 0; r < state.rows; ++r) {
    const int64_t row = task.row_begin + r, result = first_result + r;
    const T* o = state.o + r * state.o_stride;
    for (int m = 0; m < kRowMembers; ++m)
      static_cast<T*>(task.row_state)[m * task.member_stride + result] = row_state[m * V::kLanes + r];
    const V factor = broadcast<V>(scale[r]);
    S* out = static_cast<S*>(h.out) + row / h.group * h.out_stride_s + row % h.group * h.out_stride_g;
    for (int64_t c = 0; c < h.value_dim; c += V::kLanes) {
      const int64_t n = min64(V::kLanes, h.value_dim - c);
      if (task.partial != nullptr)
        narrow_n(static_cast<T*>(task.partial) + result * h.value_dim + c, load(o + c), n);
      else
        narrow_strided(out + c * h.out_stride_d, h.out_stride_d, load(o + c) * factor, n);
    }
  }
}

// C is what keys and values are stored as.
template <class V, class S, int R, class C>
static void decode_rows(const RowTask& task) {
  using T = typename V::T;
  const HeadTask* heads = task.head;
  const HeadTask& first = heads[0];
  Arena<T> arena{static_cast<T*>(task.scratch)};
  DecodeState<V, R> states[kMaxHeadsTogether];
  for (int64_t x = 0; x < task.heads; ++x)
    begin_decode<V, typename Products<V, S>::template FewRowsScore<C, R>, S, R>(task, heads[x], arena, states[x]);

  // Positions and lengths are the sequence's, so the same for all its heads.
  KeyRange range = visible_keys(first, task.row_begin, task.row_end);
  range = {max64(range.begin, task.key_begin), min64(range.end, task.key_end)};
  C* packed_k = reinterpret_cast<C*>(arena.take(kKeyBlock * first.head_dim));
  C* packed_v = reinterpret_cast<C*>(arena.take(kKeyBlock * first.value_dim));
  const C *k_pointers[kKeyBlock], *v_pointers[kKeyBlock], *ahead_pointers[kKeyBlock];

  // The rows of all heads, from the first head's on: the plan puts heads together that lie side by side.
  const bool asks =
      (range.end - range.begin) * task.heads * (first.head_dim + first.value_dim) * static_cast<int64_t>(sizeof(C)) >
      kAheadFromBytes;
  const auto ahead_to = [&](const KeyArray& a, int64_t begin, int64_t n, int64_t used) {
    if (!asks || n <= 0 || a.stride_d != 1) return Ahead<C>();
    return Ahead<C>(key_rows<V, C, C>(first, a, begin, n, nullptr, ahead_pointers), n, task.heads * a.width,
                    task.heads * used);
  };

  for (int64_t block = range.begin / kKeyBlock * kKeyBlock; block < range.end; block += kKeyBlock) {
    const int64_t begin = max64(block, range.begin), end = min64(block + kKeyBlock, range.end), n = end - begin;
    Ahead<C> values = ahead_to(values_of(first), begin, n, n * first.head_dim);
    for (int64_t x = 0; x < task.heads; ++x)
      decode_weights<V, S, R>(heads[x], states[x], begin, n,
                              key_rows<V, C, C>(heads[x], keys_of(heads[x]), begin, n, packed_k, k_pointers), values);
    Ahead<C> keys = ahead_to(keys_of(first), end, min64(kKeyBlock, range.end - end), n * first.value_dim);
    for (int64_t x = 0; x < task.heads; ++x)
      decode_add_values<V, S, R>(heads[x], states[x], n,
                                 key_rows<V, C, C>(heads[x], values_of(heads[x]), begin, n, packed_v, v_pointers),
                                 keys);
  }
  for (int64_t x = 0; x < task.heads; ++x)
    finish_decode<V, S, R>(task, heads[x], x * task.rows_between_heads, states[x]);
}

template <class V, class S, class C>
static void decode_stored(const RowTask& task) {
  const int64_t rows = task.row_end - task.row_begin;
  if (rows == 1) return decode_rows<V, S, 1, C>(task);
  if constexpr (kDecodeRows<V> > 4)
    if (rows > 4) return decode_rows<V, S, 8, C>(task);
  if constexpr (kDecodeRows<V> > 2)
    if (rows > 2) return decode_rows<V, S, 4, C>(task);
  decode_rows<V, S, 2, C>(task);
}

template <class V, class S>
static void decode(const RowTask& task) {
  with_stored<V, S>(task.head->kv_dtype, [&task]<class C>(const C*) { decode_stored<V, S, C>(task); });
}

}  // namespace
}  // namespace foveal
