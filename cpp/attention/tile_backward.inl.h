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
// is one pass over both, and dQ^T = K^T dS^T is summed in the same form. dV and dK have columns in the lanes.
//
//   qt, dot     [head_dim | value_dim][rows]   q * scale * log2(e), and dout, transposed
//   q, dout     [rows][head_dim | value_dim]   the same rows, in place where they are stored so
//   p, ds       [kGradientKeys][rows]          of one key block
//   dq_sums     [head_dim][rows]               over all key blocks
//   key_sums    [keys][head_dim | value_dim]   dk then dv of each key, over all rows
//
// Every sum runs over tiles of rows, or over keys, in ascending order and one element at a time, wherever blocks begin:
// so how a problem is cut into tasks does not show in the bits.
#pragma once

namespace foveal {
namespace {

constexpr int64_t kGradientKeys = 64;  // p and ds of a tile stay in the first-level cache

template <class V>
struct GradientTile {
  using T = typename V::T;
  int64_t row_begin, rows;
  int vectors;
  T *qt, *dot;
  Rows<T> q, dout;  // padded to whole vectors with anything finite, in place: by nothing
  T *lse, *delta;   // a lane a row; +inf and 0 beyond the last
  T* dq;
  bool untouched;  // dq is undefined and counts as 0
  bool finite;     // lse, delta, q and dout are
};

template <class V>
FOVEAL_INLINE int64_t padded(int64_t width) {
  return round_up(width, V::kLanes);
}

// ---- entry of a tile ------------------------------------------------------------------------------------------------

// Row-major rows for the products that have columns in the lanes: in place, or widened and padded with zeros.
template <class V, class S>
static Rows<typename V::T> gradient_rows(const HeadTask& h, const GradientTile<V>& tile, const void* base,
                                         int64_t stride_s, int64_t stride_g, int64_t stride_d, int64_t width,
                                         typename V::T* buffer) {
  using T = typename V::T;
  const S* src = static_cast<const S*>(base);
  if constexpr (__is_same(S, T))
    if (stride_d == 1 && h.group == 1 && width % V::kLanes == 0) return {src + tile.row_begin * stride_s, stride_s};
  const int64_t stride = padded<V>(width);
  for (int r = 0; r < tile.vectors; ++r) {
    const S* rows[V::kLanes];
    const int64_t done = int64_t{r} * V::kLanes;
    row_pointers<V>(h.group, tile.row_begin + done, tile.rows - done, src, stride_s, stride_g, rows);
    for (int lane = 0; lane < V::kLanes && rows[lane] != nullptr; ++lane)
      for (int64_t c = 0; c < width; c += V::kLanes)
        store(buffer + (done + lane) * stride + c,
              widen_strided<V>(rows[lane] + c * stride_d, stride_d, min64(V::kLanes, width - c)));
  }
  return {buffer, stride};
}

template <class V, class S, class Dot>
static void begin_gradient_tile(const GradientTask& task, GradientTile<V>& tile, typename V::T* q_buffer,
                                typename V::T* dout_buffer) {
  using T = typename V::T;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  const int64_t width = int64_t{tile.vectors} * V::kLanes;
  for (int r = 0; r < tile.vectors; ++r) {
    const int64_t done = int64_t{r} * V::kLanes, first = tile.row_begin + done, rows = tile.rows - done;
    const S* pointers[V::kLanes];
    row_pointers<V>(h.group, first, rows, static_cast<const S*>(h.q), h.q_stride_s, h.q_stride_g, pointers);
    load_transposed<V, S, Dot>(pointers, h.q_stride_d, h.head_dim, score_scale<V>(h), tile.qt + done, width);
    row_pointers<V>(h.group, first, rows, static_cast<const S*>(g.dout), g.dout_stride_s, g.dout_stride_g, pointers);
    load_transposed<V, S, Dot>(pointers, g.dout_stride_d, h.value_dim, broadcast<V>(1), tile.dot + done, width);
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const bool inside = lane < rows;
      tile.lse[done + lane] = inside ? static_cast<const T*>(g.lse)[first + lane] : static_cast<T>(__builtin_inf());
      tile.delta[done + lane] = inside ? static_cast<const T*>(g.delta)[first + lane] : T{0};
    }
  }
  tile.q = gradient_rows<V, S>(h, tile, h.q, h.q_stride_s, h.q_stride_g, h.q_stride_d, h.head_dim, q_buffer);
  tile.dout =
      gradient_rows<V, S>(h, tile, g.dout, g.dout_stride_s, g.dout_stride_g, g.dout_stride_d, h.value_dim, dout_buffer);
  tile.finite = all_finite<V>(tile.lse, 0, 1, tile.rows) && all_finite<V>(tile.delta, 0, 1, tile.rows) &&
                all_finite<V>(tile.q.p, tile.q.stride, tile.rows, h.head_dim) &&
                all_finite<V>(tile.dout.p, tile.dout.stride, tile.rows, h.value_dim);
}

// ---- a tile and a key block -----------------------------------------------------------------------------------------

template <class V, class Dot>
struct GradientKeys {
  using T = typename V::T;
  using Key = typename Dot::Key;
  int64_t begin, end;
  Rows<Key> k, v;   // for the scores and for dP
  Rows<T> k_value;  // k as dQ adds it
  T *dk, *dv;       // sums
  int64_t sums_stride;

  GradientKeys part(int64_t from, int64_t to) const {
    GradientKeys keys = *this;
    const int64_t skip = from - begin;
    keys.begin = from;
    keys.end = to;
    keys.k.p += skip * k.stride;
    keys.v.p += skip * v.stride;
    keys.k_value.p += skip * k_value.stride;
    keys.dk += skip * sums_stride;
    keys.dv += skip * sums_stride;
    return keys;
  }
};

// dbias += ds, summed over the axes of stride 0.
template <class V, int NV>
static void add_to_bias(const GradientHead& g, const GradientTile<V>& tile, int64_t key_begin, int64_t n,
                        const typename V::T* ds) {
  using T = typename V::T;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  T* dbias = static_cast<T*>(g.dbias);
  if (g.dbias_stride_k == 1 && g.dbias_stride_s != 0) {
    for (int r = 0; r < NV; ++r) {
      T* rows[V::kLanes];
      const int64_t done = int64_t{r} * V::kLanes;
      row_pointers<V>(g.head->group, tile.row_begin + done, tile.rows - done, dbias, g.dbias_stride_s, g.dbias_stride_g,
                      rows);
      for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
        const int64_t keys = min64(V::kLanes, n - j0);
        V block[V::kLanes];
        for (int lane = 0; lane < V::kLanes; ++lane)
          block[lane] = lane < keys ? load(ds + (j0 + lane) * width + done) : zero<V>();
        transpose(block);
        for (int lane = 0; lane < V::kLanes && rows[lane] != nullptr; ++lane) {
          T* to = rows[lane] + key_begin + j0;
          narrow_n(to, widen_n(to, keys) + block[lane], keys);
        }
      }
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = tile.row_begin / g.head->group, head = tile.row_begin % g.head->group;
    for (int64_t r = 0; r < tile.rows; ++r) {
      dbias[i * g.dbias_stride_s + head * g.dbias_stride_g + (key_begin + j) * g.dbias_stride_k] += ds[j * width + r];
      if (++head == g.head->group) {
        head = 0;
        ++i;
      }
    }
  }
}

// Masked elements become 0, whatever NaN the product with a masked key or value gave.
template <class V, int NV>
static void keep_seen(const uint64_t* seen, int64_t n, typename V::T* ds) {
  for (int64_t j = 0; j < n; ++j)
    for (int r = 0; r < NV; ++r) {
      typename V::T* x = ds + (j * NV + r) * V::kLanes;
      store(x, select(mask_from_bits<V>(seen[j] >> (r * V::kLanes)), load(x), zero<V>()));
    }
}

// p = exp(s - lse) with every policy of the scores, and slope = d(capped score)/d(score) where there is a soft cap.
template <class V, class Dot, int NV>
static void weights_with_policies(const HeadTask& h, const GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                                  const uint64_t* seen, typename V::T* p, typename V::T* slope) {
  using T = typename V::T;
  const int64_t n = keys.end - keys.begin, size = n * NV * V::kLanes;
  const V scale = score_scale<V>(h);
  key_products<V, Dot, NV>(tile.qt, h.head_dim, keys.k.p, keys.k.stride, n,
                           [&](int64_t j, int r, V dot) __attribute__((always_inline)) {
                             store(p + (j * NV + r) * V::kLanes, Dot::finish(dot, scale));
                           });
  if (h.softcap > 0) {
    const V cap = broadcast<V>(static_cast<T>(h.softcap * kLog2E));
    const V inverse = broadcast<V>(static_cast<T>(1.0 / (h.softcap * kLog2E)));
    for (int64_t x = 0; x < size; x += V::kLanes) {
      const V t = tanh(load(p + x) * inverse);
      store(p + x, cap * t);
      store(slope + x, fma(zero<V>() - t, t, broadcast<V>(1)));
    }
    if (seen != nullptr) keep_seen<V, NV>(seen, n, slope);
  }
  if (h.slopes != nullptr) apply_alibi<V, NV>(h, tile.row_begin, keys.begin, n, p);
  if (h.bias != nullptr) add_bias<V, NV>(h, tile.row_begin, tile.rows, keys.begin, n, p);
  if (seen != nullptr) apply_bits<V, NV>(seen, n, p);
  for (int64_t j = 0; j < n; ++j)
    for (int r = 0; r < NV; ++r) {
      T* x = p + (j * NV + r) * V::kLanes;
      // Where scores are of the size of finfo.min, the rounding of the lse alone could make a weight infinite.
      store(x, exp2_nonpositive(min(zero<V>(), load(x) - load(tile.lse + r * V::kLanes))));
    }
}

template <class V, class Dot, int NV>
static void add_gradients(const GradientHead& g, GradientTile<V>& tile, const GradientKeys<V, Dot>& keys,
                          typename V::T* p, typename V::T* ds, typename V::T* slope) {
  const HeadTask& h = *g.head;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  const int64_t n = keys.end - keys.begin;
  uint64_t bits[kGradientKeys];
  const Visibility visibility = visible_bits(h, tile.row_begin, tile.rows, keys.begin, n, bits);
  if (visibility == Visibility::kNone) return;
  const uint64_t* seen = visibility == Visibility::kPartial ? bits : nullptr;

  if (h.softcap > 0 || h.slopes != nullptr || h.bias != nullptr || seen != nullptr) {
    weights_with_policies<V, Dot, NV>(h, tile, keys, seen, p, slope);
  } else {
    const V scale = score_scale<V>(h);
    key_products<V, Dot, NV>(
        tile.qt, h.head_dim, keys.k.p, keys.k.stride, n, [&](int64_t j, int r, V dot) __attribute__((always_inline)) {
          const V score = Dot::finish(dot, scale);
          store(p + j * width + r * V::kLanes, exp2_nonpositive(score - load(tile.lse + r * V::kLanes)));
        });
  }
  key_products<V, Dot, NV>(tile.dot, h.value_dim, keys.v.p, keys.v.stride, n,
                           [&](int64_t j, int r, V dp) __attribute__((always_inline)) {
                             const V w = load(p + j * width + r * V::kLanes);
                             store(ds + j * width + r * V::kLanes, w * (dp - load(tile.delta + r * V::kLanes)));
                           });
  if (drops(h))  // p and dp times f, so ds = p (f dp - delta)
    for_each_dropout<V, NV>(h, tile.row_begin, keys.begin, n, [&](int64_t x, V f) {
      const V w = load(p + x), delta = load(tile.delta + x % width);
      store(ds + x, fma(f, load(ds + x), (f - broadcast<V>(1)) * w * delta));
      store(p + x, f * w);
    });
  if (seen != nullptr) keep_seen<V, NV>(seen, n, ds);
  if (g.dbias != nullptr) add_to_bias<V, NV>(g, tile, keys.begin, n, ds);
  if (h.softcap > 0)
    for (int64_t x = 0; x < n * width; x += V::kLanes) store(ds + x, load(ds + x) * load(slope + x));

  V keep[NV];
  for (int r = 0; r < NV; ++r) keep[r] = broadcast<V>(1);
  const int64_t head_width = padded<V>(h.head_dim), value_width = padded<V>(h.value_dim);
  const bool guarded = seen != nullptr && !(tile.finite && all_finite<V>(keys.k.p, keys.k.stride, n, h.head_dim));
  if (guarded) {
    add_rows_guarded<V>(p, width, n, tile.dout.p, tile.dout.stride, tile.rows, value_width, keys.dv, keys.sums_stride,
                        seen);
    add_rows_guarded<V>(ds, width, n, tile.q.p, tile.q.stride, tile.rows, head_width, keys.dk, keys.sums_stride, seen);
    add_values_guarded<V, NV>(ds, n, keys.k_value.p, keys.k_value.stride, h.head_dim, tile.dq, keep, tile.untouched,
                              [seen](int64_t j, int r) { return mask_from_bits<V>(~seen[j] >> (r * V::kLanes)); });
  } else {
    add_rows<V>(p, width, n, tile.dout.p, tile.dout.stride, tile.rows, value_width, keys.dv, keys.sums_stride);
    add_rows<V>(ds, width, n, tile.q.p, tile.q.stride, tile.rows, head_width, keys.dk, keys.sums_stride);
    if (tile.untouched)
      add_values<V, NV, true>(ds, n, keys.k_value.p, keys.k_value.stride, h.head_dim, tile.dq, keep);
    else
      add_values<V, NV, false>(ds, n, keys.k_value.p, keys.k_value.stride, h.head_dim, tile.dq, keep);
  }
  tile.untouched = false;
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <class V>
static int64_t key_sums_width(const HeadTask& h) {
  return padded<V>(h.head_dim) + padded<V>(h.value_dim);
}

template <class V>
static int64_t backward_scratch_nbytes(const HeadTask& h, int64_t rows) {
  const int64_t tiles = (rows + kTileRows<V> - 1) / kTileRows<V>;
  const int64_t dims = padded<V>(h.head_dim) + padded<V>(h.value_dim);
  const int64_t per_tile = kTileRows<V> * (2 * dims + 2) + static_cast<int64_t>(sizeof(GradientTile<V>));
  const int64_t shared = kGradientKeys * (3 * kTileRows<V> + 2 * h.head_dim + h.value_dim);
  return round_up((tiles * per_tile + shared) * static_cast<int64_t>(sizeof(typename V::T)) + 16 * 64, 64);
}

template <class V, class S>
static void backward_delta(const GradientTask& task) {
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

template <class V, class S>
static void backward(const GradientTask& task) {
  using T = typename V::T;
  using Dot = ScoreDot<V, S>;
  using Key = typename Dot::Key;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  Arena<T> arena{static_cast<T*>(task.scratch)};
  const int64_t tiles = (task.row_end - task.row_begin + kTileRows<V> - 1) / kTileRows<V>;
  T* p = arena.take(kGradientKeys * kTileRows<V>);
  T* ds = arena.take(kGradientKeys * kTileRows<V>);
  T* slope = arena.take(kGradientKeys * kTileRows<V>);
  Key* packed_k = reinterpret_cast<Key*>(arena.take(kGradientKeys * h.head_dim));
  Key* packed_v = reinterpret_cast<Key*>(arena.take(kGradientKeys * h.value_dim));
  T* packed_value = arena.take(kGradientKeys * h.head_dim);
  GradientTile<V>* tile =
      reinterpret_cast<GradientTile<V>*>(arena.take(tiles * static_cast<int64_t>(sizeof(GradientTile<V>) / sizeof(T))));
  for (int64_t t = 0; t < tiles; ++t) {
    GradientTile<V>& x = tile[t];
    x.row_begin = task.row_begin + t * kTileRows<V>;
    x.rows = min64(kTileRows<V>, task.row_end - x.row_begin);
    x.vectors = static_cast<int>((x.rows + V::kLanes - 1) / V::kLanes);
    x.qt = arena.take(kTileRows<V> * padded<V>(h.head_dim));
    x.dot = arena.take(kTileRows<V> * padded<V>(h.value_dim));
    x.lse = arena.take(kTileRows<V>);
    x.delta = arena.take(kTileRows<V>);
    x.dq = static_cast<T*>(task.dq_sums) + t * kTileRows<V> * h.head_dim;
    x.untouched = task.first;
    T* q_buffer = arena.take(kTileRows<V> * padded<V>(h.head_dim));
    T* dout_buffer = arena.take(kTileRows<V> * padded<V>(h.value_dim));
    begin_gradient_tile<V, S, Dot>(task, x, q_buffer, dout_buffer);
  }

  KeyRange range = visible_keys(h, task.row_begin, task.row_end);
  range = {max64(range.begin, task.key_begin), min64(range.end, task.key_end)};
  const int64_t head_width = padded<V>(h.head_dim), sums_stride = key_sums_width<V>(h);
  for (int64_t block = range.begin / kGradientKeys * kGradientKeys; block < range.end; block += kGradientKeys) {
    GradientKeys<V, Dot> keys;
    keys.begin = max64(block, range.begin);
    keys.end = min64(block + kGradientKeys, range.end);
    const int64_t n = keys.end - keys.begin;
    const S* k = static_cast<const S*>(h.k) + keys.begin * h.k_stride_s;
    const S* v = static_cast<const S*>(h.v) + keys.begin * h.v_stride_s;
    keys.k = rows_as<V, Key>(k, h.k_stride_s, h.k_stride_d, n, h.head_dim, packed_k);
    keys.v = rows_as<V, Key>(v, h.v_stride_s, h.v_stride_d, n, h.value_dim, packed_v);
    if constexpr (__is_same(Key, T))
      keys.k_value = keys.k;
    else
      keys.k_value = rows_as<V, T>(k, h.k_stride_s, h.k_stride_d, n, h.head_dim, packed_value);
    keys.dk = static_cast<T*>(task.key_sums) + (keys.begin - task.key_begin) * sums_stride;
    keys.dv = keys.dk + head_width;
    keys.sums_stride = sums_stride;
    for (int64_t t = 0; t < tiles; ++t) {
      const KeyRange own = visible_keys(h, tile[t].row_begin, tile[t].row_begin + tile[t].rows);
      const int64_t begin = max64(keys.begin, own.begin), end = min64(keys.end, own.end);
      if (begin >= end) continue;
      const GradientKeys<V, Dot> part = keys.part(begin, end);
      if (tile[t].vectors == 1)
        add_gradients<V, Dot, 1>(g, tile[t], part, p, ds, slope);
      else if (tile[t].vectors == 2)
        add_gradients<V, Dot, 2>(g, tile[t], part, p, ds, slope);
      else
        add_gradients<V, Dot, 3>(g, tile[t], part, p, ds, slope);
    }
  }

  for (int64_t t = 0; t < tiles; ++t) {
    const GradientTile<V>& x = tile[t];
    const int64_t width = int64_t{x.vectors} * V::kLanes;
    if (x.untouched)
      for (int64_t at = 0; at < h.head_dim * width; at += V::kLanes) store(x.dq + at, zero<V>());
    if (!task.last) continue;
    for (int r = 0; r < x.vectors; ++r) {
      S* rows[V::kLanes];
      const int64_t done = int64_t{r} * V::kLanes;
      row_pointers<V>(h.group, x.row_begin + done, x.rows - done, static_cast<S*>(g.dq), g.dq_stride_s, g.dq_stride_g,
                      rows);
      write_transposed(x.dq + done, width, h.head_dim, broadcast<V>(static_cast<T>(h.scale)), rows, g.dq_stride_d);
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
