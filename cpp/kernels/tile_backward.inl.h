// The backward kernel: one block of rows against a range of keys, five products a pair of blocks.
//
// With P = exp(S - lse) recomputed from the saved log-sum-exp and delta_i = dout_i . out_i (Dao et al. 2022, appendix
// B.2),
//
//   dP = dout V^T      dS = P * (dP - delta)      dV = P^T dout      dK = scale dS^T Q      dQ = scale dS K
//
// (with dropout, F of factors 0 or 1 / (1 - p):  dS = P * (F * dP - delta),  dV = (F * P)^T dout).
//
// As in the forward kernel, query rows are in the lanes: S^T = K Q^T and dP^T = V dout^T come out transposed, a block
// is one pass over both, and dQ^T = K^T dS^T is summed in the same form. dV and dK have columns in the lanes. All five
// products take Dot::kStep elements a multiply-add; with pairs, p and ds are rounded before they are summed
// (gradient_pairs.inl.h).
//
//   p, ds       [kGradientKeys][rows]          of one key block
//   dq_sums     [head_dim][rows]               over all key blocks; then [kRowSums][rows], where they are asked for
//   key_sums    [keys][head_dim | value_dim]   dk then dv of each key, over all rows
//
// Every sum runs over tiles of rows, or over keys, in ascending order and one step at a time, wherever blocks begin: so
// how a problem is cut into tasks does not show in the bits.
#pragma once

#include "kernels/additive.inl.h"
#include "kernels/arena.inl.h"
#include "kernels/bfloat16_products.inl.h"
#include "kernels/bias_gradient.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/dropout.inl.h"
#include "kernels/gradient_pairs.inl.h"
#include "kernels/gradient_tile.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/lanes.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/normalizer.inl.h"
#include "kernels/products.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/score_policy.inl.h"
#include "kernels/storage.inl.h"
#include "kernels/tile_threshold.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

constexpr int64_t kGradientKeys = 64;  // p and ds of a tile stay in the first-level cache
constexpr int64_t kRowTerms = 5;       // of a tile: RowTerms, and those of the entropy

// What a call works with beside its tiles: of one tile and key block, and of one key block for all tiles.
template <class V, class Dot>
struct GradientScratch {
  using T = typename V::T;
  T *p, *ds;
  PolicyGradients<T> policies;
  typename Dot::Key *packed_k, *packed_v;  // where they cannot be read in place
  // Of pairs: ds by keys, the keys; and q, dout and k as guarded sums read them.
  T *listed_k = nullptr, *listed_v = nullptr, *listed_sums = nullptr;  // of the keys that some row weighs
  T* powers = nullptr;                                                 // of keys, with additive scores
  T *ds_pairs = nullptr, *k_pairs = nullptr, *wide_q = nullptr, *wide_dout = nullptr, *wide_k = nullptr;

  GradientScratch(Arena<T>& arena, const GradientHead& g) {
    using Key = typename Dot::Key;
    const HeadTask& h = *g.head;
    const auto take = [&arena] { return arena.take(kGradientKeys * kTileRows<V>); };
    p = take();
    ds = take();
    if (bends_scores(h)) policies.softcap = take();
    if (has_gate(h)) policies.gate = take();
    if (has_gate(h)) policies.gate_argument = take();
    if (has_span(h) && g.row_sums != nullptr) policies.span = take();
    if (takes_log_sigmoid(h)) policies.log_sigmoid = take();
    if (is_additive(h)) powers = arena.take(kGradientKeys * h.head_dim);
    packed_k = reinterpret_cast<Key*>(arena.take(kGradientKeys * h.head_dim));
    packed_v = reinterpret_cast<Key*>(arena.take(kGradientKeys * h.value_dim));
    if constexpr (Dot::kStep == 1) {
      if (!hides_zero_weights(h.normalizer)) return;
      listed_k = arena.take(kGradientKeys * h.head_dim);
      listed_v = arena.take(kGradientKeys * h.value_dim);
      listed_sums = arena.take(kGradientKeys * (padded<V>(h.head_dim) + padded<V>(h.value_dim)));
    } else {
      ds_pairs = arena.take(kGradientKeys / 2 * kTileRows<V>);
      k_pairs = arena.take(kGradientKeys / 2 * padded<V>(h.head_dim));
      wide_q = arena.take(kTileRows<V> * padded<V>(h.head_dim));
      wide_dout = arena.take(kTileRows<V> * padded<V>(h.value_dim));
      wide_k = arena.take(kGradientKeys * padded<V>(h.head_dim));
    }
  }
};

// ---- a tile and a key block -----------------------------------------------------------------------------------------

template <class V, class Dot>
struct GradientKeys {
  using T = typename V::T;
  using Key = typename Dot::Key;
  int64_t begin, end;
  Rows<Key> k, v;   // for the scores and for dP
  Rows<T> k_value;  // steps of keys, as dQ adds them
  T *dk, *dv;       // sums
  AdditiveKeys<T> additive;
  int64_t sums_stride, head_dim;

  GradientKeys part(int64_t from, int64_t to) const {
    GradientKeys keys = *this;
    const int64_t skip = from - begin;
    keys.begin = from;
    keys.end = to;
    keys.k.p += skip * k.stride;
    keys.v.p += skip * v.stride;
    keys.k_value.p += skip / Dot::kStep * k_value.stride;
    keys.dk += skip * sums_stride;
    keys.dv += skip * sums_stride;
    if (keys.additive.powers != nullptr) {
      keys.additive.k += skip * keys.additive.stride;
      keys.additive.powers += skip * head_dim;
    }
    return keys;
  }
};

// Masked elements become 0, whatever NaN the product with a masked key or value gave.
template <class V, int NV>
static void keep_seen(const uint64_t* seen, int64_t n, typename V::T* ds) {
  for (int64_t j = 0; j < n; ++j)
    for (int r = 0; r < NV; ++r) {
      typename V::T* x = ds + (j * NV + r) * V::kLanes;
      store(x, select(mask_from_bits<V>(seen[j] >> (r * V::kLanes)), load(x), zero<V>()));
    }
}

// The weights with every policy of the scores, and the slopes of those that bend them.
template <class V, class Dot, int NV>
static void weights_with_policies(const HeadTask& h, const GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                                  const uint64_t* seen, typename V::T* p,
                                  const PolicyGradients<typename V::T>& policies) {
  const int64_t n = keys.end - keys.begin;
  const V scale = score_scale<V>(h);
  if (is_additive(h))
    additive_scores<V, NV>(h, tile.additive, keys.additive, n,
                           [&](int64_t j, int r, V score)
                               __attribute__((always_inline)) { store(p + (j * NV + r) * V::kLanes, score); });
  else
    key_products<V, Dot, NV>(tile.qt, h.head_dim, keys.k.p, keys.k.stride, n,
                             [&](int64_t j, int r, V dot) __attribute__((always_inline)) {
                               store(p + (j * NV + r) * V::kLanes, Dot::finish(dot, scale));
                             });
  const RowLanes<V, NV> lanes{tile.row_begin, tile.rows};
  apply_policies<V>(h, lanes, keys.begin, n, p, policies);
  if (seen != nullptr) for_each_array(policies, [&](typename V::T* x) { keep_seen<V, NV>(seen, n, x); });
  RowTerms<V> terms[NV];
  for (int r = 0; r < NV; ++r) terms[r] = tile.terms(r);
  with_gradient(h, [&]<class N>(N) {
    apply_mask<V>(lanes, seen, n, p, [&](int64_t x, int r, V score) __attribute__((always_inline)) {
      store(p + x, N::gradient_weight(score, terms[r]));
    });
  });
}

// The share of the tile and the keys in dv, dk and dq.
template <class V, class Dot, int NV>
static void add_sums(const HeadTask& h, const GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                     const GradientScratch<V, Dot>& at) {
  constexpr int64_t stride = int64_t{NV} * V::kLanes / Dot::kStep;  // of p and ds by rows
  const int64_t n = keys.end - keys.begin;
  const typename V::T* ds_by_keys = at.ds;
  if constexpr (Dot::kStep == 2) {
    round_key_pairs<V, NV>(at.ds, n, at.ds_pairs);
    round_row_pairs<V, NV>(at.ds, n);
    round_row_pairs<V, NV>(at.p, n);
    ds_by_keys = at.ds_pairs;
  }
  const int64_t row_steps = (tile.rows + Dot::kStep - 1) / Dot::kStep, key_steps = (n + Dot::kStep - 1) / Dot::kStep;
  add_rows<V, Dot>(at.p, stride, n, tile.dout.p, tile.dout.stride, row_steps, padded<V>(h.value_dim), keys.dv,
                   keys.sums_stride);
  add_rows<V, Dot>(at.ds, stride, n, tile.q.p, tile.q.stride, row_steps, padded<V>(h.head_dim), keys.dk,
                   keys.sums_stride);
  V keep[NV];
  for (int r = 0; r < NV; ++r) keep[r] = broadcast<V>(1);
  const Rows<typename V::T>& k = keys.k_value;
  if (tile.untouched)
    add_values<V, Dot, NV, true>(ds_by_keys, key_steps, k.p, k.stride, h.head_dim, tile.dq, keep);
  else
    add_values<V, Dot, NV, false>(ds_by_keys, key_steps, k.p, k.stride, h.head_dim, tile.dq, keep);
}

// The same where a masked pair may meet an inf or NaN; always one element a step.
template <class V, class Dot, int NV>
static void add_sums_guarded(const HeadTask& h, const GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                             const GradientScratch<V, Dot>& at, const uint64_t* seen) {
  constexpr int64_t stride = int64_t{NV} * V::kLanes;
  const int64_t n = keys.end - keys.begin;
  Rows<typename V::T> q = tile.q, dout = tile.dout, k = keys.k_value;
  if constexpr (Dot::kStep == 2) {
    q = unpack_pairs<V>(q, tile.rows, at.wide_q);
    dout = unpack_pairs<V>(dout, tile.rows, at.wide_dout);
    k = unpack_pairs<V>(k, n, at.wide_k);
  }
  add_rows_guarded<V>(at.p, stride, n, dout.p, dout.stride, tile.rows, padded<V>(h.value_dim), keys.dv,
                      keys.sums_stride, seen);
  add_rows_guarded<V>(at.ds, stride, n, q.p, q.stride, tile.rows, padded<V>(h.head_dim), keys.dk, keys.sums_stride,
                      seen);
  V keep[NV];
  for (int r = 0; r < NV; ++r) keep[r] = broadcast<V>(1);
  add_values_guarded<V, NV>(at.ds, n, k.p, k.stride, h.head_dim, tile.dq, keep, tile.untouched,
                            [seen](int64_t j, int r) { return mask_from_bits<V>(~seen[j] >> (r * V::kLanes)); });
}

// What the gradient of the entropy takes from that of a weight of row `lane`, counted in the tile.
template <class V>
FOVEAL_INLINE V entropy_gradient(const GradientTile<V>& tile, int64_t lane, V w) {
  return fma(load(tile.entropy_slope + lane), log2(w), load(tile.entropy_shift + lane));
}

// Whether the weights are those of softmax, of whatever became of the scores.
FOVEAL_INLINE bool is_softmax(const HeadTask& h) { return !has_threshold(h.normalizer) && !is_pointwise(h.normalizer); }

// The gradients of softmax's scores: p times what dp is more than the row's term, and p as the values meet it.
template <class V, class Dot, int NV>
static void softmax_gradients(const HeadTask& h, const GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                              typename V::T* p, typename V::T* ds) {
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  const int64_t n = keys.end - keys.begin;
  key_products<V, Dot, NV>(tile.dot, h.value_dim, keys.v.p, keys.v.stride, n,
                           [&](int64_t j, int r, V dp) __attribute__((always_inline)) {
                             const V w = load(p + j * width + r * V::kLanes);
                             store(ds + j * width + r * V::kLanes, Softmax::score_gradient(w, dp, tile.terms(r)));
                           });
  // The mean of the entropy's gradient over the weights is 0, so it does not enter delta. Dropout is none of its.
  const auto add_entropy = [&](int64_t x, V w) __attribute__((always_inline)) {
    if (tile.entropy_slope != nullptr) store(ds + x, load(ds + x) - w * entropy_gradient(tile, x % width, w));
  };
  if (drops(h))  // p and dp times f, so ds = p (f dp - delta)
    for_each_dropout<V, NV>(h, tile.row_begin, keys.begin, n, [&](int64_t x, V f) {
      const V w = load(p + x), delta = load(tile.delta + x % width);
      store(ds + x, fma(f, load(ds + x), (f - broadcast<V>(1)) * w * delta));
      add_entropy(x, w);
      store(p + x, f * w);
    });
  else if (tile.entropy_slope != nullptr)
    for (int64_t x = 0; x < n * width; x += V::kLanes) add_entropy(x, load(p + x));
}

// The same of any other normaliser.
template <class V, class Dot, int NV>
static void other_gradients(const HeadTask& h, const GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                            typename V::T* p, typename V::T* ds) {
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  const int64_t n = keys.end - keys.begin;
  key_products<V, Dot, NV>(tile.dot, h.value_dim, keys.v.p, keys.v.stride, n,
                           [&](int64_t j, int r, V dp)
                               __attribute__((always_inline)) { store(ds + j * width + r * V::kLanes, dp); });
  if (drops(h))
    for_each_dropout<V, NV>(h, tile.row_begin, keys.begin, n, [&](int64_t x, V f) { store(ds + x, f * load(ds + x)); });
  if (tile.entropy_slope != nullptr)
    for (int64_t x = 0; x < n * width; x += V::kLanes)
      store(ds + x, load(ds + x) - entropy_gradient(tile, x % width, load(p + x)));
  RowTerms<V> terms[NV];
  for (int r = 0; r < NV; ++r) terms[r] = tile.terms(r);
  with_gradient(h, [&]<class N>(N) {
    for (int64_t j = 0; j < n; ++j)
      for (int r = 0; r < NV; ++r) {
        const int64_t x = j * width + r * V::kLanes;
        store(ds + x, N::score_gradient(load(p + x), load(ds + x), terms[r]));
      }
  });
  if (drops(h)) apply_dropout<V, NV>(h, tile.row_begin, keys.begin, n, p);
}

// Takes the pairs whose weight is 0 out of bits[n]; whether any are left of some, and none of others.
template <class V, int NV>
static void drop_zero_weights(const typename V::T* p, int64_t n, uint64_t* bits) {
  for (int64_t j = 0; j < n; ++j) {
    uint64_t zeros = 0;
    for (int r = 0; r < NV; ++r)
      zeros |= lane_bits(equal(load(p + (j * NV + r) * V::kLanes), zero<V>())) << (r * V::kLanes);
    bits[j] &= ~zeros;
  }
}

// The keys of a block that some row weighs, alone: what is done to a block is done to these in their place. Sums of
// keys are taken along and brought back, so their order stays.
template <class V, class Dot, int NV>
struct ListedKeys {
  using T = typename V::T;
  int64_t n = 0;
  uint8_t at[kGradientKeys];

  ListedKeys(const uint64_t* bits, int64_t size) {
    for (int64_t j = 0; j < size; ++j)
      if (bits[j] != 0) at[n++] = static_cast<uint8_t>(j);
  }

  void compact(uint64_t* bits) const {
    for (int64_t e = 0; e < n; ++e) bits[e] = bits[at[e]];
  }
  // An array [key][rows].
  void compact(T* x) const {
    constexpr int64_t width = int64_t{NV} * V::kLanes;
    for (int64_t e = 0; e < n; ++e)
      for (int r = 0; r < NV; ++r) store(x + e * width + r * V::kLanes, load(x + at[e] * width + r * V::kLanes));
  }
  static void copy(const T* from, int64_t from_stride, const uint8_t* index, int64_t n, int64_t width, T* to) {
    for (int64_t e = 0; e < n; ++e)
      for (int64_t c = 0; c < width; c += V::kLanes)
        narrow_n(to + e * width + c, widen_n(from + index[e] * from_stride + c, width - c), width - c);
  }

  GradientKeys<V, Dot> gather(const HeadTask& h, const GradientKeys<V, Dot>& keys,
                              const GradientScratch<V, Dot>& scratch) const {
    GradientKeys<V, Dot> listed = keys;
    const int64_t width = padded<V>(h.head_dim) + padded<V>(h.value_dim);
    listed.end = keys.begin + n;
    copy(keys.k.p, keys.k.stride, at, n, h.head_dim, scratch.listed_k);
    copy(keys.v.p, keys.v.stride, at, n, h.value_dim, scratch.listed_v);
    copy(keys.dk, keys.sums_stride, at, n, width, scratch.listed_sums);
    listed.k = listed.k_value = {scratch.listed_k, h.head_dim};
    listed.v = {scratch.listed_v, h.value_dim};
    listed.dk = scratch.listed_sums;
    listed.dv = listed.dk + padded<V>(h.head_dim);
    listed.sums_stride = width;
    return listed;
  }
  void bring_back(const GradientKeys<V, Dot>& listed, const GradientKeys<V, Dot>& keys) const {
    for (int64_t e = 0; e < n; ++e)
      for (int64_t c = 0; c < listed.sums_stride; c += V::kLanes)
        store(keys.dk + at[e] * keys.sums_stride + c, load(listed.dk + e * listed.sums_stride + c));
  }
};

// Sums over the n keys of a block what `of(x)` gives for x in [key][rows], into one vector of rows each, in their
// order.
template <class V, int NV, class Of>
FOVEAL_INLINE void add_to_rows(int64_t n, typename V::T* sums, const Of& of) {
  for (int r = 0; r < NV; ++r) {
    V sum = load(sums + r * V::kLanes);
    for (int64_t j = 0; j < n; ++j) sum = of((j * NV + r) * V::kLanes, sum);
    store(sums + r * V::kLanes, sum);
  }
}

// From the gradients of the scores as the normaliser sees them to those of the biased scores, policy by policy.
template <class V, int NV>
static void through_late_policies(const HeadTask& h, const GradientTile<V>& tile,
                                  const PolicyGradients<typename V::T>& policies, int64_t n, typename V::T* ds) {
  using T = typename V::T;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  if (takes_log_sigmoid(h))
    for (int64_t x = 0; x < n * width; x += V::kLanes) store(ds + x, load(ds + x) * load(policies.log_sigmoid + x));
  const auto sums = [&](RowSum m) { return tile.row_sums + m * kTileRows<V>; };
  if (has_span(h) && tile.row_sums != nullptr)
    add_to_rows<V, NV>(n, sums(kSpanSum), [&](int64_t x, V sum) __attribute__((always_inline)) {
      return fma(load(ds + x), load(policies.span + x), sum);
    });
  if (!has_gate(h)) return;
  const T *gate = policies.gate, *argument = policies.gate_argument;
  if (tile.row_sums != nullptr) {
    add_to_rows<V, NV>(n, sums(kGateTauSum), [&](int64_t x, V sum) __attribute__((always_inline)) {
      return sum - load(ds + x) * load(gate + x);
    });
    add_to_rows<V, NV>(n, sums(kGateTemperatureSum), [&](int64_t x, V sum) __attribute__((always_inline)) {
      return sum - load(ds + x) * load(gate + x) * load(argument + x);
    });
  }
  for (int64_t x = 0; x < n * width; x += V::kLanes) store(ds + x, fma(load(ds + x), load(gate + x), load(ds + x)));
}

// The share of a tile in dv where scores are additive.
template <class V, int NV, class Keys>
static void add_values_of_additive(const HeadTask& h, const GradientTile<V>& tile, const Keys& keys,
                                   const typename V::T* p, int64_t n, const uint64_t* seen) {
  constexpr int64_t stride = int64_t{NV} * V::kLanes;
  if (seen != nullptr && !tile.finite)
    add_rows_guarded<V>(p, stride, n, tile.dout.p, tile.dout.stride, tile.rows, padded<V>(h.value_dim), keys.dv,
                        keys.sums_stride, seen);
  else
    add_rows<V, WidenedDot<V, typename V::T>>(p, stride, n, tile.dout.p, tile.dout.stride, tile.rows,
                                              padded<V>(h.value_dim), keys.dv, keys.sums_stride);
}

// From the weights of a tile and keys to their share of all sums.
template <class V, class Dot, int NV>
static void finish_gradients(const GradientHead& g, GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                             const GradientScratch<V, Dot>& scratch, const uint64_t* seen) {
  const HeadTask& h = *g.head;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  const int64_t n = keys.end - keys.begin;
  typename V::T *p = scratch.p, *ds = scratch.ds;
  if (is_softmax(h))
    softmax_gradients<V, Dot, NV>(h, tile, keys, p, ds);
  else
    other_gradients<V, Dot, NV>(h, tile, keys, p, ds);
  if (seen != nullptr) keep_seen<V, NV>(seen, n, ds);
  through_late_policies<V, NV>(h, tile, scratch.policies, n, ds);
  if (g.dbias != nullptr) add_to_bias<V, NV>(g, tile.row_begin, tile.rows, keys.begin, n, ds);
  if (bends_scores(h))
    for (int64_t x = 0; x < n * width; x += V::kLanes) store(ds + x, load(ds + x) * load(scratch.policies.softcap + x));

  if (is_additive(h)) {
    add_values_of_additive<V, NV>(h, tile, keys, p, n, seen);
    const auto add = tile.additive.wide || keys.additive.wide ? add_additive_gradients<V, NV, true>
                                                              : add_additive_gradients<V, NV, false>;
    if (tile.untouched)
      for (int64_t x = 0; x < h.head_dim * width; ++x) tile.dq[x] = tile.du[x] = 0;
    add(h, tile.additive, keys.additive, n, ds, seen, tile.dq, keys.dk, keys.sums_stride, tile.du);
  } else if (seen != nullptr && !(tile.finite && all_finite<V>(keys.k.p, keys.k.stride, n, h.head_dim)))
    add_sums_guarded<V, Dot, NV>(h, tile, keys, scratch, seen);
  else
    add_sums<V, Dot, NV>(h, tile, keys, scratch);
  tile.untouched = false;
}

template <class V, class Dot, int NV>
static void add_gradients(const GradientHead& g, GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                          const GradientScratch<V, Dot>& scratch) {
  const HeadTask& h = *g.head;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  const int64_t n = keys.end - keys.begin;
  typename V::T* p = scratch.p;
  uint64_t bits[kGradientKeys];
  const Visibility visibility = visible_bits(h, tile.row_begin, tile.rows, keys.begin, n, bits);
  if (visibility == Visibility::kNone) return;
  const uint64_t* seen = visibility == Visibility::kPartial ? bits : nullptr;
  if (changes_scores(h) || is_additive(h) || seen != nullptr || !is_softmax(h)) {
    weights_with_policies<V, Dot, NV>(h, tile, keys, seen, p, scratch.policies);
  } else {
    const V scale = score_scale<V>(h);
    key_products<V, Dot, NV>(
        tile.qt, h.head_dim, keys.k.p, keys.k.stride, n, [&](int64_t j, int r, V dot) __attribute__((always_inline)) {
          const V score = Dot::finish(dot, scale);
          store(p + j * width + r * V::kLanes, Softmax::plain_gradient_weight(score, load(tile.shift + r * V::kLanes)));
        });
  }
  if (hides_zero_weights(h.normalizer)) {
    if (seen == nullptr)
      for (int64_t j = 0; j < n; ++j) bits[j] = low_bits(tile.rows);
    drop_zero_weights<V, NV>(p, n, bits);
    seen = bits;
    const ListedKeys<V, Dot, NV> list(bits, n);
    if (list.n == 0) return;
    // A bias and dropout go by where keys are.
    if constexpr (Dot::kStep == 1)
      if (list.n < n * 3 / 4 && g.dbias == nullptr && !drops(h) && !is_additive(h)) {
        const GradientKeys<V, Dot> listed = list.gather(h, keys, scratch);
        list.compact(bits);
        list.compact(p);
        for_each_array(scratch.policies, [&](typename V::T* x) { list.compact(x); });
        finish_gradients<V, Dot, NV>(g, tile, listed, scratch, bits);
        return list.bring_back(listed, keys);
      }
  }
  finish_gradients<V, Dot, NV>(g, tile, keys, scratch, seen);
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <class V>
static int64_t key_sums_width(const HeadTask& h) {
  return padded<V>(h.head_dim) + padded<V>(h.value_dim);
}

template <class V, class Dot>
static int64_t backward_scratch_nbytes(const HeadTask& h, int64_t rows) {
  const int64_t tiles = (rows + kTileRows<V> - 1) / kTileRows<V>;
  const int64_t dims = padded<V>(h.head_dim) + padded<V>(h.value_dim);
  const int64_t per_tile = kTileRows<V> * (2 * dims + kRowTerms) + static_cast<int64_t>(sizeof(GradientTile<V>));
  const int64_t additive =
      is_additive(h) ? tiles * (AdditiveRows<V>::elements(h.head_dim) + 16) + (kGradientKeys + 1) * (h.head_dim + 16)
                     : 0;
  int64_t shared = additive + kGradientKeys * ((2 + kPolicyGradients) * kTileRows<V> + h.head_dim + h.value_dim);
  if constexpr (Dot::kStep == 1)
    shared += hides_zero_weights(h.normalizer) ? kGradientKeys * 2 * dims : 0;
  else
    shared += kGradientKeys * (kTileRows<V> + 2 * padded<V>(h.head_dim)) + kTileRows<V> * dims;
  return round_up((tiles * per_tile + shared) * static_cast<int64_t>(sizeof(typename V::T)) + 16 * 64 + tiles * 64, 64);
}

// The keys that some of the rows see, and those that share a step with one.
template <class Dot>
FOVEAL_INLINE KeyRange keys_in_steps(const HeadTask& h, int64_t row_begin, int64_t row_end) {
  const KeyRange range = visible_keys(h, row_begin, row_end);
  if (range.begin >= range.end) return range;
  return {range.begin / Dot::kStep * Dot::kStep, min64(round_up(range.end, Dot::kStep), h.kv_len)};
}

// delta of the rows, dout . out.
template <class V, class S>
static void softmax_terms(const GradientTask& task) {
  using T = typename V::T;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  int64_t i = task.row_begin / h.group, head = task.row_begin % h.group;
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const S* out = static_cast<const S*>(h.out) + i * h.out_stride_s + head * h.out_stride_g;
    const S* dout = static_cast<const S*>(g.dout) + i * g.dout_stride_s + head * g.dout_stride_g;
    V sum = zero<V>();
    for (int64_t c = 0; c < h.value_dim; c += V::kLanes) {
      const int64_t n = min64(V::kLanes, h.value_dim - c);
      sum = fma(widen_strided<V>(out + c * h.out_stride_d, h.out_stride_d, n),
                widen_strided<V>(dout + c * g.dout_stride_d, g.dout_stride_d, n), sum);
    }
    static_cast<T*>(g.delta)[row] = reduce_add(sum);
    if (++head == h.group) {
      head = 0;
      ++i;
    }
  }
}

// What the gradient reads of the rows, all but what the forward pass saved of them.
template <class V, class S>
static void backward_terms(const GradientTask& task) {
  using T = typename V::T;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  if (has_threshold(h.normalizer)) return threshold_terms<V, S>(task);
  for (int64_t row = task.row_begin; row < task.row_end; ++row) static_cast<T*>(g.threshold)[row] = 0;
  if (!is_pointwise(h.normalizer)) return softmax_terms<V, S>(task);
  with_normalizer(h, [&]<class N>(N) {
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      static_cast<T*>(g.shift)[row] = 0;
      T state[kRowMembers];
      N::begin(h, row, false, state, 1);
      if constexpr (requires { N::row_term(T{}); }) static_cast<T*>(g.delta)[row] = N::row_term(state[kRowSum]);
    }
  });
}

template <class V, class S>
static void backward(const GradientTask& task) {
  using T = typename V::T;
  using Dot = ScoreDot<V, S>;
  using Key = typename Dot::Key;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  Arena<T> arena{static_cast<T*>(task.scratch)};
  const int64_t tiles = (task.row_end - task.row_begin + kTileRows<V> - 1) / kTileRows<V>;
  const GradientScratch<V, Dot> scratch(arena, g);
  GradientTile<V>* tile =
      reinterpret_cast<GradientTile<V>*>(arena.take(tiles * static_cast<int64_t>(sizeof(GradientTile<V>) / sizeof(T))));
  for (int64_t t = 0; t < tiles; ++t) {
    GradientTile<V>& x = tile[t];
    x.row_begin = task.row_begin + t * kTileRows<V>;
    x.rows = min64(kTileRows<V>, task.row_end - x.row_begin);
    x.vectors = static_cast<int>((x.rows + V::kLanes - 1) / V::kLanes);
    x.qt = arena.take(kTileRows<V> * padded<V>(h.head_dim));
    x.dot = arena.take(kTileRows<V> * padded<V>(h.value_dim));
    x.shift = arena.take(kTileRows<V>);
    x.threshold = arena.take(kTileRows<V>);
    x.delta = arena.take(kTileRows<V>);
    x.entropy_slope = g.entropy_slope != nullptr ? arena.take(kTileRows<V>) : nullptr;
    x.entropy_shift = g.entropy_slope != nullptr ? arena.take(kTileRows<V>) : nullptr;
    x.dq = static_cast<T*>(task.dq_sums) + t * kTileRows<V> * sums_of_row(g);
    x.du = is_additive(h) ? x.dq + kTileRows<V> * h.head_dim : nullptr;
    x.row_sums = g.row_sums != nullptr ? x.dq + kTileRows<V> * (sums_of_row(g) - kRowSums) : nullptr;
    x.untouched = task.first;
    if (task.first && x.row_sums != nullptr)
      for (int64_t at = 0; at < kRowSums * kTileRows<V>; ++at) x.row_sums[at] = 0;
    T* q_buffer = arena.take(kTileRows<V> * padded<V>(h.head_dim));
    T* dout_buffer = arena.take(kTileRows<V> * padded<V>(h.value_dim));
    begin_gradient_tile<V, S, Dot>(task, x, q_buffer, dout_buffer);
    if (is_additive(h))
      x.additive.begin(h, x.row_begin, x.vectors, x.qt, arena.take(AdditiveRows<V>::elements(h.head_dim)));
  }

  KeyRange range = keys_in_steps<Dot>(h, task.row_begin, task.row_end);
  range = {max64(range.begin, task.key_begin), min64(range.end, task.key_end)};
  const int64_t head_width = padded<V>(h.head_dim), sums_stride = key_sums_width<V>(h);
  for (int64_t block = range.begin / kGradientKeys * kGradientKeys; block < range.end; block += kGradientKeys) {
    GradientKeys<V, Dot> keys;
    keys.begin = max64(block, range.begin);
    keys.end = min64(block + kGradientKeys, range.end);
    const int64_t n = keys.end - keys.begin;
    const S* k = static_cast<const S*>(h.k) + keys.begin * h.k_stride_s;
    const S* v = static_cast<const S*>(h.v) + keys.begin * h.v_stride_s;
    keys.k = rows_as<V, Key>(k, h.k_stride_s, h.k_stride_d, n, h.head_dim, scratch.packed_k);
    keys.v = rows_as<V, Key>(v, h.v_stride_s, h.v_stride_d, n, h.value_dim, scratch.packed_v);
    if constexpr (Dot::kStep == 2) {
      const auto chunk_at = [&](int64_t j, int64_t c) __attribute__((always_inline)) {
        return Dot::load_chunk_n(keys.k.row(j) + c, h.head_dim - c);
      };
      keys.k_value = pack_pairs<V>(n, padded<V>(h.head_dim), chunk_at, scratch.k_pairs);
    } else {
      keys.k_value = keys.k;
    }
    keys.dk = static_cast<T*>(task.key_sums) + (keys.begin - task.key_begin) * sums_stride;
    keys.dv = keys.dk + head_width;
    keys.sums_stride = sums_stride;
    keys.head_dim = h.head_dim;
    keys.additive = {};
    if constexpr (__is_same(Key, T))
      if (is_additive(h))
        keys.additive = {keys.k.p, keys.k.stride, scratch.powers,
                         exp_keys<V>(keys.k.p, keys.k.stride, n, h.head_dim, scratch.powers)};
    for (int64_t t = 0; t < tiles; ++t) {
      const KeyRange own = keys_in_steps<Dot>(h, tile[t].row_begin, tile[t].row_begin + tile[t].rows);
      const int64_t begin = max64(keys.begin, own.begin), end = min64(keys.end, own.end);
      if (begin >= end) continue;
      const GradientKeys<V, Dot> part = keys.part(begin, end);
      if (tile[t].vectors == 1)
        add_gradients<V, Dot, 1>(g, tile[t], part, scratch);
      else if (tile[t].vectors == 2)
        add_gradients<V, Dot, 2>(g, tile[t], part, scratch);
      else
        add_gradients<V, Dot, 3>(g, tile[t], part, scratch);
    }
  }

  for (int64_t t = 0; t < tiles; ++t) {
    const GradientTile<V>& x = tile[t];
    const int64_t width = int64_t{x.vectors} * V::kLanes;
    if (x.untouched)
      for (int64_t at = 0; at < h.head_dim * width; ++at) {
        x.dq[at] = 0;
        if (x.du != nullptr) x.du[at] = 0;
      }
    if (!task.last) continue;
    if (x.row_sums != nullptr)
      for (int m = 0; m < kRowSums; ++m)
        for (int64_t r = 0; r < x.rows; ++r)
          static_cast<T*>(g.row_sums)[m * g.row_sums_stride + x.row_begin + r] = x.row_sums[m * kTileRows<V> + r];
    for (int r = 0; r < x.vectors; ++r) {
      S* rows[V::kLanes];
      const int64_t done = int64_t{r} * V::kLanes;
      row_pointers<V>(h.group, x.row_begin + done, x.rows - done, static_cast<S*>(g.dq), g.dq_stride_s, g.dq_stride_g,
                      rows);
      write_transposed(x.dq + done, width, h.head_dim, broadcast<V>(static_cast<T>(h.scale)), rows, g.dq_stride_d);
      if (x.du == nullptr || g.additive_sums == nullptr) continue;
      T* sums[V::kLanes];
      for (int lane = 0; lane < V::kLanes; ++lane)
        sums[lane] = lane < x.rows - done ? static_cast<T*>(g.additive_sums) + (x.row_begin + done + lane) * h.head_dim
                                          : nullptr;
      write_transposed(x.du + done, width, h.head_dim, broadcast<V>(1), sums, 1);
    }
  }
}

template <class V, class S>
static void backward_keys(const GradientTask& task) {
  using T = typename V::T;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  const T* sums = static_cast<const T*>(task.key_sums);
  const auto write = [](const T* from, int64_t width, V factor, S* to, int64_t stride_d) {
    for (int64_t c = 0; c < width; c += V::kLanes)
      narrow_strided(to + c * stride_d, stride_d, load(from + c) * factor, min64(V::kLanes, width - c));
  };
  for (int64_t j = task.key_begin; j < task.key_end; ++j, sums += key_sums_width<V>(h)) {
    write(sums, h.head_dim, broadcast<V>(static_cast<T>(h.scale)), static_cast<S*>(g.dk) + j * g.dk_stride_s,
          g.dk_stride_d);
    write(sums + padded<V>(h.head_dim), h.value_dim, broadcast<V>(1), static_cast<S*>(g.dv) + j * g.dv_stride_s,
          g.dv_stride_d);
  }
}

}  // namespace
}  // namespace foveal
