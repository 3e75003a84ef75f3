// The forward kernel for many rows: query rows in the vector lanes.
//
// A register tile is kRowVectors vectors of rows. Its scores are computed transposed, S^T = K Q^T, and so are its
// outputs, O^T = V^T P^T, so that one row's maximum, sum and rescale factor are element-wise, K and V are read in place
// by scalar broadcast, and only Q (once, on entry) and O (once, on exit) are transposed.
//
//   qt   [head_dim][rows]     queries, transposed, times scale * log2(e)
//   s    [kKeyBlock][rows]    scores, then weights, of one key block
//   ot   [value_dim][rows]    running sums of weighted values
//
// The normaliser keeps a state a row (normalizer.inl.h). Key blocks begin at multiples of kKeyBlock whatever rows or
// ranges are asked for, every row's arithmetic is one fixed sequence, and a block that a row does not see leaves its
// state unchanged bit for bit: so a row's result does not depend on the rows beside it.
#pragma once

#include "kernels/additive.inl.h"
#include "kernels/arena.inl.h"
#include "kernels/base2.inl.h"
#include "kernels/bfloat16_products.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/dropout.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/key_rows.inl.h"
#include "kernels/lanes.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/normalizer.inl.h"
#include "kernels/products.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/score_policy.inl.h"
#include "kernels/statistics.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// One register tile of rows in scratch. `rows` may be fewer than the vectors hold; the lanes beyond compute on zeros.
template <class V>
struct Tile {
  int64_t row_begin, rows;
  int vectors;
  bool untouched;  // no key block yet: ot is undefined and counts as 0
  typename V::T *qt, *ot;
  typename V::T* state;  // [kRowMembers][kTileRows<V>]
  TileStats<V> stats;
  AdditiveRows<V> additive;
};

// ---- a tile and a key block -----------------------------------------------------------------------------------------

template <class Key, class T>
struct KeyBlock {
  int64_t begin, end;  // positions
  const Key* k;        // of position `begin`
  const T* v;
  int64_t k_stride, v_stride;
  const T* powers;  // of keys, with additive scores (additive.inl.h)
  bool wide;
  // Whether all values are finite of the block that this is part of: asked once for all tiles, and only if need be.
  bool *all_asked, *all_finite;
  int64_t all_begin, all_end;
  int64_t powers_stride;
};

template <class V, class Block>
FOVEAL_INLINE bool values_finite(const HeadTask& h, const Block& block) {
  if (!*block.all_asked) {
    *block.all_asked = true;
    *block.all_finite = all_finite<V>(block.v - (block.begin - block.all_begin) * block.v_stride, block.v_stride,
                                      block.all_end - block.all_begin, h.value_dim);
  }
  return *block.all_finite || all_finite<V>(block.v, block.v_stride, block.end - block.begin, h.value_dim);
}

// The scores of keys [begin, end), all policies applied. kNone: no row sees any of them, and s is undefined.
template <class V, class Dot, int NV>
static Visibility block_scores(const HeadTask& h, const Tile<V>& tile,
                               const KeyBlock<typename Dot::Key, typename V::T>& block, typename V::T* s,
                               V (&highest)[NV]) {
  const int64_t n = block.end - block.begin;
  uint64_t bits[kKeyBlock];
  const Visibility seen = visible_bits(h, tile.row_begin, tile.rows, block.begin, n, bits);
  if (seen == Visibility::kNone) return seen;
  const V scale = score_scale<V>(h);
  for (int r = 0; r < NV; ++r) highest[r] = negative_infinity<V>();
  const auto put = [&](int64_t j, int r, V score) __attribute__((always_inline)) {
    highest[r] = max(highest[r], score);
    store(s + (j * NV + r) * V::kLanes, score);
  };
  bool done = false;
  if constexpr (__is_same(typename Dot::Key, typename V::T))
    if (is_additive(h)) {
      additive_scores<V, NV>(h, tile.additive, {block.k, block.k_stride, block.powers, block.wide}, n, put);
      done = true;
    }
  if (!done)
    key_products<V, Dot, NV>(tile.qt, h.head_dim, block.k, block.k_stride, n,
                             [&](int64_t j, int r, V dot)
                                 __attribute__((always_inline)) { put(j, r, Dot::finish(dot, scale)); });
  if (!changes_scores(h) && seen == Visibility::kFull) return seen;
  const RowLanes<V, NV> lanes{tile.row_begin, tile.rows};
  apply_policies<V>(h, lanes, block.begin, n, s);
  for (int r = 0; r < NV; ++r) highest[r] = negative_infinity<V>();
  apply_mask<V>(lanes, seen == Visibility::kPartial ? bits : nullptr, n, s,
                [&](int64_t, int r, V score) __attribute__((always_inline)) { highest[r] = max(highest[r], score); });
  return seen;
}

template <class V, class Dot, int NV>
static void accumulate(const HeadTask& h, Tile<V>& tile, const KeyBlock<typename Dot::Key, typename V::T>& block,
                       typename V::T* s) {
  using T = typename V::T;
  V highest[NV], rescale[NV];
  const int64_t n = block.end - block.begin;
  const Visibility seen = block_scores<V, Dot, NV>(h, tile, block, s, highest);
  if (seen == Visibility::kNone) return;
  const bool hides = seen == Visibility::kPartial || hides_zero_weights(h.normalizer);
  const bool guarded = hides && !values_finite<V>(h, block);
  if (tile.stats.state != nullptr) find_argmax<V, NV>(tile.stats, block.begin, n, s, highest);
  auto state = RowState<V, NV>::read(tile.state, kTileRows<V>);
  with_normalizer(h, [&]<class N>(N) { N::step(state, s, n, highest, rescale, guarded, tile.stats); });
  state.write(tile.state, kTileRows<V>);
  if (drops(h)) apply_dropout<V, NV>(h, tile.row_begin, block.begin, n, s);  // after the sums
  if (guarded)
    add_values_guarded<V, NV>(s, n, block.v, block.v_stride, h.value_dim, tile.ot, rescale, tile.untouched,
                              [s](int64_t j, int r) { return sign_mask(load(s + (j * NV + r) * V::kLanes)); });
  else if (tile.untouched)
    add_values<V, WidenedDot<V, T>, NV, true>(s, n, block.v, block.v_stride, h.value_dim, tile.ot, rescale);
  else
    add_values<V, WidenedDot<V, T>, NV, false>(s, n, block.v, block.v_stride, h.value_dim, tile.ot, rescale);
  tile.untouched = false;
}

// ---- entry and exit of a tile ---------------------------------------------------------------------------------------

// Pointers to the rows of vector r of a tile.
template <class V, class P>
FOVEAL_INLINE void row_pointers(const HeadTask& h, const Tile<V>& tile, int r, P* base, int64_t stride_s,
                                int64_t stride_g, P* (&pointers)[V::kLanes]) {
  const int64_t done = int64_t{r} * V::kLanes;
  row_pointers<V>(h.group, tile.row_begin + done, tile.rows - done, base, stride_s, stride_g, pointers);
}

template <class V, class S, class Dot>
static void begin_tile(const RowTask& task, Tile<V>& tile) {
  const HeadTask& h = *task.head;
  const V scale = is_additive(h) ? broadcast<V>(1) : score_scale<V>(h);
  const int64_t width = int64_t{tile.vectors} * V::kLanes;
  for (int r = 0; r < tile.vectors; ++r) {
    const S* q[V::kLanes];
    row_pointers(h, tile, r, static_cast<const S*>(h.q), h.q_stride_s, h.q_stride_g, q);
    load_transposed<V, S, Dot>(q, h.q_stride_d, h.head_dim, scale, tile.qt + r * V::kLanes, width);
    with_normalizer(h, [&]<class N>(N) {
      for (int64_t x = int64_t{r} * V::kLanes; x < (r + 1) * V::kLanes; ++x)
        N::begin(h, tile.row_begin + x, task.partial == nullptr, tile.state + x, kTileRows<V>);
    });
  }
  tile.untouched = true;
}

// The statistics of a tile of a one-pass normaliser.
template <class V>
static void finish_tile_statistics(const RowTask& task, const Tile<V>& tile) {
  using T = typename V::T;
  T* to = static_cast<T*>(task.row_stats) + (tile.row_begin - task.row_begin);
  for (int r = 0; r < tile.vectors; ++r) {
    const auto state = RowState<V, 1>::read(tile.state + r * V::kLanes, kTileRows<V>);
    const V highest = load(tile.stats.member(kStatHighest, r));
    V largest, unit;
    with_normalizer(*task.head, [&]<class N>(N) {
      largest = N::largest_weight(highest, state);
      unit = N::scale(state, 0);
    });
    finish_statistics<V>(load(tile.stats.member(kStatSum, r)), load(tile.stats.member(kStatLogs, r)), largest, unit,
                         zero<V>(), to + r * V::kLanes, task.stats_stride);
  }
  for (int64_t x = 0; x < tile.rows; ++x)
    task.row_argmax[tile.row_begin - task.row_begin + x] =
        to[kRowMass * task.stats_stride + x] == 0 ? -1 : tile.stats.argmax[x];
}

template <class V, class S>
static void finish_tile(const RowTask& task, const Tile<V>& tile) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  if (tile.untouched)
    for (int64_t x = 0; x < h.value_dim * tile.vectors * V::kLanes; x += V::kLanes) store(tile.ot + x, zero<V>());
  const int64_t width = int64_t{tile.vectors} * V::kLanes;
  for (int r = 0; r < tile.vectors; ++r) {
    const T* ot = tile.ot + r * V::kLanes;
    if (task.partial != nullptr) {
      T* rows[V::kLanes];
      for (int lane = 0; lane < V::kLanes; ++lane) {
        const int64_t row = r * V::kLanes + lane;
        rows[lane] = row < tile.rows
                         ? static_cast<T*>(task.partial) + (tile.row_begin - task.row_begin + row) * h.value_dim
                         : nullptr;
      }
      write_transposed(ot, width, h.value_dim, broadcast<V>(1), rows, 1);
    } else {
      S* rows[V::kLanes];
      row_pointers(h, tile, r, static_cast<S*>(h.out), h.out_stride_s, h.out_stride_g, rows);
      const auto state = RowState<V, 1>::read(tile.state + r * V::kLanes, kTileRows<V>);
      const V scale = with_normalizer(h, [&]<class N>(N) { return N::scale(state, 0); });
      write_transposed(ot, width, h.value_dim, scale, rows, h.out_stride_d);
    }
  }
  if (task.row_stats != nullptr && !has_threshold(h.normalizer)) finish_tile_statistics<V>(task, tile);
  T* result = static_cast<T*>(task.row_state) + (tile.row_begin - task.row_begin);
  for (int m = 0; m < kRowMembers; ++m)
    for (int64_t x = 0; x < tile.rows; ++x) result[m * task.member_stride + x] = tile.state[m * kTileRows<V> + x];
}

// The second time that a block is seen: its final weights, for those who asked for something made of them.
template <class V, class S, class Dot, int NV>
static void use_weights(const RowTask& task, const Tile<V>& tile,
                        const KeyBlock<typename Dot::Key, typename V::T>& block, typename V::T* s) {
  const HeadTask& h = *task.head;
  V highest[NV];
  if (block_scores<V, Dot, NV>(h, tile, block, s, highest) == Visibility::kNone) return;
  const int64_t n = block.end - block.begin;
  const auto state = RowState<V, NV>::read(tile.state, kTileRows<V>);
  with_normalizer(h, [&]<class N>(N) {
    for (int r = 0; r < NV; ++r)
      for (int64_t j = 0; j < n; ++j) {
        typename V::T* x = s + (j * NV + r) * V::kLanes;
        store(x, N::final_weight(state, r, load(x)));
      }
  });
  if (task.key_mass != nullptr || task.top_k > 0) {
    for (int r = 0; r < NV; ++r) {
      const int64_t rows = tile.rows - int64_t{r} * V::kLanes;
      if (rows >= V::kLanes) continue;
      const auto inside = mask_from_bits<V>(low_bits(max64(0, rows)));
      for (int64_t j = 0; j < n; ++j) {
        typename V::T* x = s + (j * NV + r) * V::kLanes;
        store(x, select(inside, load(x), zero<V>()));
      }
    }
    if (task.key_mass != nullptr) add_key_mass<V, NV>(task, tile.row_begin, tile.rows, block.begin, n, s);
    if (task.top_k > 0)
      find_top<V, NV>(task, tile.stats, 0, tile.row_begin - task.row_begin, n, s,
                      [&](int64_t j) { return block.begin + j; });
  }
  if (h.weights == nullptr) return;
  if (drops(h)) apply_dropout<V, NV>(h, tile.row_begin, block.begin, n, s);
  for (int r = 0; r < NV; ++r) {
    S* rows[V::kLanes];
    row_pointers(h, tile, r, static_cast<S*>(h.weights), h.weights_stride_s, h.weights_stride_g, rows);
    for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
      const int64_t width = min64(V::kLanes, n - j0);
      V weights[V::kLanes];
      for (int lane = 0; lane < V::kLanes; ++lane)
        weights[lane] = lane < width ? load(s + ((j0 + lane) * NV + r) * V::kLanes) : zero<V>();
      transpose(weights);
      for (int lane = 0; lane < V::kLanes && rows[lane] != nullptr; ++lane)
        narrow_strided(rows[lane] + (block.begin + j0) * h.weights_stride_k, h.weights_stride_k, weights[lane], width);
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// K and V of a key block as the products want them: in place where they are stored so, else packed once and shared by
// the tiles.
template <class V, class S, class Dot>
struct KeyReader {
  using T = typename V::T;
  using Key = typename Dot::Key;
  const HeadTask* h;
  Key* packed_k;
  T* packed_v;
  T* powers;  // with additive scores

  // Without values, those of the block are undefined.
  KeyBlock<Key, T> read(int64_t begin, int64_t end, bool with_values) const {
    Rows<Key> k = {};
    Rows<T> v = {};
    with_stored<V, S>(h->kv_dtype, [&]<class C>(const C*) {
      k = key_rows<V, Key, C>(*h, keys_of(*h), begin, end - begin, packed_k, nullptr);
      if (with_values) v = key_rows<V, T, C>(*h, values_of(*h), begin, end - begin, packed_v, nullptr);
    });
    bool wide = false;
    if constexpr (__is_same(Key, T))
      if (is_additive(*h)) wide = exp_keys<V>(k.p, k.stride, end - begin, h->head_dim, powers);
    return {begin, end, k.p, v.p, k.stride, v.stride, powers, wide, nullptr, nullptr, begin, end, h->head_dim};
  }
};

// The part of `block` inside `range`.
template <class Key, class T>
FOVEAL_INLINE KeyBlock<Key, T> intersect(KeyBlock<Key, T> block, KeyRange range) {
  const int64_t begin = max64(block.begin, range.begin), end = min64(block.end, range.end);
  block.k += (begin - block.begin) * block.k_stride;
  block.v += (begin - block.begin) * block.v_stride;
  if (block.powers != nullptr) block.powers += (begin - block.begin) * block.powers_stride;
  block.begin = begin;
  block.end = end;
  return block;
}

template <class V>
static int64_t forward_scratch_nbytes(const HeadTask& h, int64_t rows) {
  const int64_t tiles = (rows + kTileRows<V> - 1) / kTileRows<V>;
  const int64_t per_tile = kTileRows<V> * (h.head_dim + h.value_dim + kRowMembers + kStatMembers + 3) +
                           static_cast<int64_t>(sizeof(Tile<V>));
  const int64_t shared = kKeyBlock * (kTileRows<V> + h.head_dim + h.value_dim);
  const int64_t additive =
      is_additive(h) ? tiles * (AdditiveRows<V>::elements(h.head_dim) + 16) + kKeyBlock * h.head_dim : 0;
  return round_up((tiles * per_tile + shared + additive) * static_cast<int64_t>(sizeof(typename V::T)) + 5 * 64, 64);
}

// The tiles of a task, begun, and what they share.
template <class V, class S>
struct ForwardWork {
  using T = typename V::T;
  using Dot = ScoreDot<V, S>;
  using Block = KeyBlock<typename Dot::Key, T>;
  const RowTask& task;
  T* s;
  KeyReader<V, S, Dot> reader;
  int64_t tiles;
  Tile<V>* tile;

  ForwardWork(const RowTask& t, Arena<T>& arena) : task(t) {
    const HeadTask& h = *task.head;
    s = arena.take(kKeyBlock * kTileRows<V>);
    reader.h = &h;
    reader.packed_k = reinterpret_cast<typename Dot::Key*>(arena.take(kKeyBlock * h.head_dim));
    reader.packed_v = arena.take(kKeyBlock * h.value_dim);
    reader.powers = is_additive(h) ? arena.take(kKeyBlock * h.head_dim) : nullptr;
    tiles = (task.row_end - task.row_begin + kTileRows<V> - 1) / kTileRows<V>;
    tile = reinterpret_cast<Tile<V>*>(arena.take(tiles * static_cast<int64_t>(sizeof(Tile<V>) / sizeof(T))));
    for (int64_t x = 0; x < tiles; ++x) {
      const int64_t row_begin = task.row_begin + x * kTileRows<V>;
      const int64_t rows = min64(kTileRows<V>, task.row_end - row_begin);
      tile[x] = {row_begin,
                 rows,
                 static_cast<int>((rows + V::kLanes - 1) / V::kLanes),
                 true,
                 arena.take(kTileRows<V> * h.head_dim),
                 arena.take(kTileRows<V> * h.value_dim),
                 arena.take(kRowMembers * kTileRows<V>),
                 {},
                 {}};
      if (task.row_stats != nullptr) {
        tile[x].stats = {arena.take(kStatMembers * kTileRows<V>),
                         reinterpret_cast<int64_t*>(arena.take(2 * kTileRows<V>)), arena.take(kTileRows<V>),
                         kTileRows<V>};
        tile[x].stats.begin();
      }
      begin_tile<V, S, Dot>(task, tile[x]);
      if (is_additive(h))
        tile[x].additive.begin(h, row_begin, tile[x].vectors, tile[x].qt,
                               arena.take(AdditiveRows<V>::elements(h.head_dim)));
    }
  }

  // visit(t, block) for every tile and block of keys that it sees something of.
  template <class Visit>
  FOVEAL_INLINE void for_each_block(bool with_values, const Visit& visit) const {
    const HeadTask& h = *task.head;
    KeyRange range = visible_keys(h, task.row_begin, task.row_end);
    range = {max64(range.begin, task.key_begin), min64(range.end, task.key_end)};
    for (int64_t begin = range.begin / kKeyBlock * kKeyBlock; begin < range.end; begin += kKeyBlock) {
      Block all = reader.read(max64(begin, range.begin), min64(begin + kKeyBlock, range.end), with_values);
      bool asked = false, finite = false;
      all.all_asked = &asked;
      all.all_finite = &finite;
      for (int64_t t = 0; t < tiles; ++t) {
        const Block block = intersect(all, visible_keys(h, tile[t].row_begin, tile[t].row_begin + tile[t].rows));
        if (block.begin < block.end) visit(t, block);
      }
    }
  }
};

template <class V, class S>
static void forward(const RowTask& task) {
  using Dot = ScoreDot<V, S>;
  const HeadTask& h = *task.head;
  Arena<typename V::T> arena{static_cast<typename V::T*>(task.scratch)};
  const ForwardWork<V, S> work(task, arena);
  work.for_each_block(true, [&](int64_t x, const auto& block) {
    Tile<V>& t = work.tile[x];
    if (t.vectors == 1)
      accumulate<V, Dot, 1>(h, t, block, work.s);
    else if (t.vectors == 2)
      accumulate<V, Dot, 2>(h, t, block, work.s);
    else
      accumulate<V, Dot, 3>(h, t, block, work.s);
  });
  for (int64_t t = 0; t < work.tiles; ++t) finish_tile<V, S>(task, work.tile[t]);
  if (h.weights == nullptr && task.key_mass == nullptr && task.top_k == 0) return;
  work.for_each_block(false, [&](int64_t x, const auto& block) {
    const Tile<V>& t = work.tile[x];
    if (t.vectors == 1)
      use_weights<V, S, Dot, 1>(task, t, block, work.s);
    else if (t.vectors == 2)
      use_weights<V, S, Dot, 2>(task, t, block, work.s);
    else
      use_weights<V, S, Dot, 3>(task, t, block, work.s);
  });
}

}  // namespace
}  // namespace foveal
