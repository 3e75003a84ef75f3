// The kernels of normalisers with a threshold (threshold.inl.h), on the tiles of the many-rows kernel.
//
// Scores are computed as for softmax, block by block. Each vector of rows keeps a list of the keys that may have
// weight; after the last block the list gives the thresholds, and the values are added of the keys that have weight,
// which are few: on standard normal scores 3% of the keys of a vector under sparsemax, 15% under 1.5-entmax.
#pragma once

#include "kernels/arena.inl.h"
#include "kernels/bfloat16_products.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/dropout.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/key_rows.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/normalizer.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/storage.inl.h"
#include "kernels/threshold.inl.h"
#include "kernels/tile_forward.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// ---- the keys of a vector of rows -----------------------------------------------------------------------------------

// Of one tile.
template <class V>
struct ThresholdTile {
  KeyList<V> lists[kRowVectors];
  V highest[kRowVectors];

  // With room for `keys` keys.
  ThresholdTile(Arena<typename V::T>& arena, int64_t keys) {
    constexpr int64_t kElementsAKey = static_cast<int64_t>(sizeof(int64_t) / sizeof(typename V::T));
    for (int r = 0; r < kRowVectors; ++r) {
      lists[r] = {arena.take((keys + 1) * V::kLanes),
                  reinterpret_cast<int64_t*>(arena.take((keys + 1) * kElementsAKey)), 0};
      highest[r] = negative_infinity<V>();
    }
  }

  static int64_t elements(int64_t keys) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename V::T));
    return kRowVectors *
           ((keys + 1) * (V::kLanes + static_cast<int64_t>(sizeof(int64_t) / sizeof(typename V::T))) + 2 * kLine);
  }

  // +inf where a row has seen nothing.
  FOVEAL_INLINE V shift(int r) const {
    return select(equal(highest[r], negative_infinity<V>()), zero<V>() - negative_infinity<V>(), highest[r]);
  }
};

template <class V, class Dot, int NV>
static void offer_keys(const HeadTask& h, const Tile<V>& tile, const KeyBlock<typename Dot::Key, typename V::T>& block,
                       typename V::T* s, ThresholdTile<V>& at) {
  V highest[NV];
  if (block_scores<V, Dot, NV>(h, tile, block, s, highest) == Visibility::kNone) return;
  const int64_t n = block.end - block.begin;
  with_threshold(h, [&]<class N>(N) {
    for (int r = 0; r < NV; ++r) {
      const auto rows = mask_from_bits<V>(low_bits(max64(0, tile.rows - int64_t{r} * V::kLanes)));
      at.highest[r] = select(rows, max(at.highest[r], highest[r]), negative_infinity<V>());
      const V least = least_score<N>(at.highest[r]);
      KeyList<V> list = at.lists[r];
      for (int64_t j = 0; j < n; ++j) {
        const V score = load(s + (j * NV + r) * V::kLanes);
        list.offer(block.begin + j, score, reaches(score, least));
      }
      at.lists[r] = list;
    }
  });
}

template <class V, class Dot>
static void offer_keys(const HeadTask& h, const Tile<V>& tile, const KeyBlock<typename Dot::Key, typename V::T>& block,
                       typename V::T* s, ThresholdTile<V>& at) {
  if (tile.vectors == 1)
    offer_keys<V, Dot, 1>(h, tile, block, s, at);
  else if (tile.vectors == 2)
    offer_keys<V, Dot, 2>(h, tile, block, s, at);
  else
    offer_keys<V, Dot, 3>(h, tile, block, s, at);
}

// What becomes of a list: its arguments turn into of(above), and keys without any drop out.
template <class V, class Of>
FOVEAL_INLINE void weigh(KeyList<V>& list, V threshold, const Of& of) {
  list.filter([&](V argument) __attribute__((always_inline)) {
    const V above = max(zero<V>(), argument - threshold);
    return Kept<V>{of(above), lane_bits(equal(above, zero<V>())) != low_bits(V::kLanes)};
  });
}

// ---- values ---------------------------------------------------------------------------------------------------------

// The value of a key, in place where it is stored as the accumulator type, else widened into `buffer`.
template <class V, class S>
FOVEAL_INLINE const typename V::T* value_row(const HeadTask& h, const KeyArray& values, int64_t key,
                                             typename V::T* buffer) {
  using T = typename V::T;
  if constexpr (__is_same(S, T))
    if (h.pages == nullptr && values.stride_d == 1) return static_cast<const T*>(values.p) + key * values.stride_s;
  const T* row = nullptr;
  with_stored<V, S>(h.kv_dtype,
                    [&]<class C>(const C*) { row = key_rows<V, T, C>(h, values, key, 1, buffer, nullptr).p; });
  return row;
}

constexpr int64_t kListedValues = 64;  // keys whose values are at hand at once

template <class V, int NC, bool kGuarded>
FOVEAL_INLINE void add_listed(const typename V::T* weights, const typename V::T* const* rows, int64_t n, int64_t column,
                              typename V::T* ot, int64_t width) {
  V acc[NC];
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c) acc[c] = load(ot + c * width);
  for (int64_t e = 0; e < n; ++e) {
    const V w = load(weights + e * V::kLanes);
    const typename V::T* v = rows[e] + column;
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const V sum = fma(broadcast<V>(v[c]), w, acc[c]);
      acc[c] = kGuarded ? select(equal(w, zero<V>()), acc[c], sum) : sum;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c) store(ot + c * width, acc[c]);
}

// The weighted values of a list, into column after column of `ot`. A weight of 0 adds nothing, whatever the value.
template <class V, class S, bool kGuarded = false>
static void add_listed_values(const HeadTask& h, const KeyList<V>& list, typename V::T* buffer, typename V::T* ot,
                              int64_t width) {
  using T = typename V::T;
  const KeyArray values = values_of(h);
  for (int64_t c = 0; c < h.value_dim; ++c) store(ot + c * width, zero<V>());
  const T* rows[kListedValues];
  for (int64_t first = 0; first < list.size; first += kListedValues) {
    const int64_t n = min64(kListedValues, list.size - first);
    const T* weights = list.values + first * V::kLanes;
    for (int64_t e = 0; e < n; ++e)
      rows[e] = value_row<V, S>(h, values, list.keys[first + e], buffer + e * h.value_dim);
    int64_t c = 0;
    for (; c + 8 <= h.value_dim; c += 8) add_listed<V, 8, kGuarded>(weights, rows, n, c, ot + c * width, width);
    for (; c < h.value_dim; ++c) add_listed<V, 1, kGuarded>(weights, rows, n, c, ot + c * width, width);
  }
  if constexpr (!kGuarded) {
    V sum = zero<V>();  // NaN where anything is not finite: then once more, with care
    for (int64_t c = 0; c < h.value_dim; ++c) sum = fma(load(ot + c * width), zero<V>(), sum);
    if (lane_bits(equal(sum, zero<V>())) != low_bits(V::kLanes))
      add_listed_values<V, S, true>(h, list, buffer, ot, width);
  }
}

template <class V>
static void drop_listed(const HeadTask& h, int64_t row_begin, const KeyList<V>& list) {
  for (int64_t e = 0; e < list.size; ++e)
    apply_dropout<V, 1>(h, row_begin, list.keys[e], 1, list.values + e * V::kLanes);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class V>
static int64_t threshold_scratch_nbytes(const HeadTask& h, int64_t rows) {
  const int64_t tiles = (rows + kTileRows<V> - 1) / kTileRows<V>;
  const int64_t elements =
      tiles * (ThresholdTile<V>::elements(h.kv_len) + static_cast<int64_t>(sizeof(ThresholdTile<V>))) +
      kListedValues * h.value_dim;
  return forward_scratch_nbytes<V>(h, rows) + elements * static_cast<int64_t>(sizeof(typename V::T)) + 4 * 64;
}

template <class V, class S>
static void write_listed_weights(const HeadTask& h, const Tile<V>& tile, int r, const KeyList<V>& list) {
  S* rows[V::kLanes];
  row_pointers(h, tile, r, static_cast<S*>(h.weights), h.weights_stride_s, h.weights_stride_g, rows);
  for (int64_t e = 0; e < list.size; ++e) {
    alignas(64) typename V::T lanes[V::kLanes];
    store(lanes, load(list.values + e * V::kLanes));
    for (int lane = 0; lane < V::kLanes && rows[lane] != nullptr; ++lane)
      narrow_n(rows[lane] + list.keys[e] * h.weights_stride_k, broadcast<V>(lanes[lane]), 1);
  }
}

// The statistics of a vector of rows from the weights of its list.
template <class V>
static void finish_list_statistics(const RowTask& task, const Tile<V>& tile, int r, const KeyList<V>& list,
                                   V threshold) {
  using T = typename V::T;
  V sum = zero<V>(), logs = zero<V>(), largest = zero<V>();
  for (int64_t e = 0; e < list.size; ++e) {
    const V w = load(list.values + e * V::kLanes);
    sum = sum + w;
    logs = fma(w, log2(w), logs);
    largest = max(largest, w);
  }
  const int64_t first = tile.row_begin - task.row_begin + int64_t{r} * V::kLanes;
  finish_statistics<V>(sum, logs, largest, broadcast<V>(1), threshold, static_cast<T*>(task.row_stats) + first,
                       task.stats_stride);
  alignas(64) T lanes[V::kLanes];
  store(lanes, largest);
  for (int64_t lane = 0; lane < min64(V::kLanes, tile.rows - int64_t{r} * V::kLanes); ++lane) {
    int64_t& argmax = task.row_argmax[first + lane];
    argmax = -1;
    for (int64_t e = 0; e < list.size && argmax < 0 && lanes[lane] > 0; ++e)
      if (list.values[e * V::kLanes + lane] == lanes[lane]) argmax = list.keys[e];
  }
  const int64_t rows = tile.rows - int64_t{r} * V::kLanes;
  const auto inside = mask_from_bits<V>(low_bits(max64(0, rows)));
  if (task.key_mass == nullptr && task.top_k == 0) return;
  for (int64_t e = 0; e < list.size; ++e)
    store(list.values + e * V::kLanes, select(inside, load(list.values + e * V::kLanes), zero<V>()));
  if (task.key_mass != nullptr)
    for (int64_t e = 0; e < list.size; ++e)
      add_key_mass<V, 1>(task, tile.row_begin + int64_t{r} * V::kLanes, min64(rows, V::kLanes), list.keys[e], 1,
                         list.values + e * V::kLanes);
  if (task.top_k > 0)
    find_top<V, 1>(task, tile.stats, r, first, list.size, list.values, [&](int64_t e) { return list.keys[e]; });
}

// From the lists of a tile to its rows' sums and states. What a row saves is its threshold, as a number of the
// formula's own: of s for sparsemax, of s/2 for 1.5-entmax.
template <class V, class S>
static void finish_thresholds(const RowTask& task, Tile<V>& tile, ThresholdTile<V>& at, typename V::T* buffer) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  const int64_t width = int64_t{tile.vectors} * V::kLanes;
  for (int r = 0; r < tile.vectors; ++r) {
    KeyList<V>& list = at.lists[r];
    const V shift = at.shift(r);
    V threshold, saved;
    with_threshold(h, [&]<class N>(N) {
      threshold = find_threshold<N>(list, shift);
      weigh(list, threshold, [](V above) __attribute__((always_inline)) { return N::weight(above); });
      saved = fma(shift, broadcast<V>(static_cast<T>(N::kArgument)), threshold);
      store(tile.state + kRowMax * kTileRows<V> + r * V::kLanes, saved * broadcast<V>(static_cast<T>(kLog2E)));
    });
    const V seen =
        select(equal(at.highest[r], negative_infinity<V>()), zero<V>(), fma(threshold, zero<V>(), broadcast<V>(1)));
    store(tile.state + kRowSum * kTileRows<V> + r * V::kLanes, seen);
    if (task.row_stats != nullptr) finish_list_statistics<V>(task, tile, r, list, saved);
    if (drops(h)) drop_listed(h, tile.row_begin + int64_t{r} * V::kLanes, list);
    if (h.weights != nullptr) write_listed_weights<V, S>(h, tile, r, list);
    add_listed_values<V, S>(h, list, buffer, tile.ot + r * V::kLanes, width);
  }
  tile.untouched = false;
}

// The keys that may have weight, of all tiles.
template <class V, class S>
static ThresholdTile<V>* list_keys(const ForwardWork<V, S>& work, Arena<typename V::T>& arena) {
  const HeadTask& h = *work.task.head;
  ThresholdTile<V>* at = reinterpret_cast<ThresholdTile<V>*>(
      arena.take(work.tiles * static_cast<int64_t>(sizeof(ThresholdTile<V>) / sizeof(typename V::T))));
  for (int64_t t = 0; t < work.tiles; ++t) at[t] = ThresholdTile<V>(arena, h.kv_len);
  work.for_each_block(false, [&](int64_t t, const auto& block) {
    offer_keys<V, typename ForwardWork<V, S>::Dot>(h, work.tile[t], block, work.s, at[t]);
  });
  return at;
}

template <class V, class S>
static void forward_threshold(const RowTask& task) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  Arena<T> arena{static_cast<T*>(task.scratch)};
  const ForwardWork<V, S> work(task, arena);
  ThresholdTile<V>* at = list_keys(work, arena);
  T* buffer = arena.take(kListedValues * h.value_dim);
  for (int64_t t = 0; t < work.tiles; ++t) {
    finish_thresholds<V, S>(task, work.tile[t], at[t], buffer);
    finish_tile<V, S>(task, work.tile[t]);
  }
}

// ---- backward: what the gradient reads of the rows ------------------------------------------------------------------

constexpr int kTermTiles = 2;  // at once

template <class V>
static int64_t threshold_terms_scratch_nbytes(const HeadTask& h) {
  return threshold_scratch_nbytes<V>(h, kTermTiles * kTileRows<V>) +
         kTileRows<V> * h.value_dim * static_cast<int64_t>(sizeof(typename V::T)) + 64;
}

// The largest score, the threshold and the row's term, of the rows of a task: with g the slope of a weight at its
// argument, the mean of dp with weights g, which is dout . (sum g v) / sum g.
template <class V, class S>
static void threshold_terms(const GradientTask& task) {
  using T = typename V::T;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  for (int64_t begin = task.row_begin; begin < task.row_end; begin += kTermTiles * kTileRows<V>) {
    RowTask rows = {};
    rows.head = &h;
    rows.heads = 1;
    rows.row_begin = begin;
    rows.row_end = min64(begin + kTermTiles * kTileRows<V>, task.row_end);
    rows.key_end = h.kv_len;
    Arena<T> arena{static_cast<T*>(task.scratch)};
    const ForwardWork<V, S> work(rows, arena);
    ThresholdTile<V>* at = list_keys(work, arena);
    T* buffer = arena.take(kListedValues * h.value_dim);
    T* dout = arena.take(kTileRows<V> * h.value_dim);
    for (int64_t x = 0; x < work.tiles; ++x) {
      const Tile<V>& tile = work.tile[x];
      const int64_t width = int64_t{tile.vectors} * V::kLanes;
      for (int r = 0; r < tile.vectors; ++r) {
        KeyList<V>& list = at[x].lists[r];
        const V shift = at[x].shift(r);
        const int64_t first = tile.row_begin + int64_t{r} * V::kLanes;
        const int64_t n = min64(V::kLanes, tile.rows - int64_t{r} * V::kLanes);
        V threshold, slopes = zero<V>(), entropy = zero<V>();
        V entropy_slope = zero<V>(), entropy_shift = zero<V>();
        if (g.entropy_slope != nullptr) {
          entropy_slope = widen_n(static_cast<const T*>(g.entropy_slope) + first, n);
          entropy_shift = widen_n(static_cast<const T*>(g.entropy_shift) + first, n);
        }
        with_threshold(h, [&]<class N>(N) {
          threshold = find_threshold<N>(list, shift);
          weigh(list, threshold, [&](V above) __attribute__((always_inline)) {
            const V slope = N::slope(above);
            slopes = slopes + slope;
            if (g.entropy_slope != nullptr)
              entropy = fma(slope, fma(entropy_slope, log2(N::weight(above)), entropy_shift), entropy);
            return slope;
          });
        });
        if (drops(h)) drop_listed(h, first, list);
        T* sums = tile.ot + r * V::kLanes;
        add_listed_values<V, S>(h, list, buffer, sums, width);
        const S* pointers[V::kLanes];
        row_pointers(h, tile, r, static_cast<const S*>(g.dout), g.dout_stride_s, g.dout_stride_g, pointers);
        load_transposed<V, S, WidenedDot<V, S>>(pointers, g.dout_stride_d, h.value_dim, broadcast<V>(1), dout,
                                                V::kLanes);
        V delta = zero<V>() - entropy;
        for (int64_t c = 0; c < h.value_dim; ++c)
          delta = fma(load(sums + c * width), load(dout + c * V::kLanes), delta);
        const auto unseen = equal(at[x].highest[r], negative_infinity<V>());
        narrow_n(static_cast<T*>(g.shift) + first, select(unseen, zero<V>(), shift), n);
        narrow_n(static_cast<T*>(g.threshold) + first, select(unseen, zero<V>(), threshold), n);
        narrow_n(static_cast<T*>(g.delta) + first, select(unseen, zero<V>(), delta / slopes), n);
      }
    }
  }
}

}  // namespace
}  // namespace foveal
