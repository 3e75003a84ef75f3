// The two products of the few-rows kernel, and the scales of an int8 cache between them.
//
//   q   [R][head_dim, padded]   queries times scale * log2(e); R = 1, 2, 4 or 8 rows, the spare ones zero
//   s   [kKeyBlock][R]          scores, then weights: lane l of a vector is row l % R of key l / R
//   o   [R][value_dim, padded]  running sums of weighted values
//
// Head dimensions lie in the lanes; every row goes with each key while that is in registers, and what is stored (C: the
// queries' type S, or int8) is widened there. The scale of an int8 page and head is no part of the products: it
// multiplies the scores of its keys and the weights of its values.
#pragma once

#include "kernels/ahead.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/storage.inl.h"
#include "kernels/stored.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

constexpr int kDecodeAccumulators = kVectorRegisters >= 32 ? 16 : 8;

// Joins the lanes of each row, over the keys of a vector; every lane of a row gets the result.
template <class V, int R, class Join>
FOVEAL_INLINE V over_keys(V x, Join join) {
  alignas(64) typename V::T lanes[V::kLanes];
  store(lanes, x);
#pragma GCC unroll 4
  for (int half = V::kLanes / 2; half >= R; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + half]);
#pragma GCC unroll 16
  for (int lane = R; lane < V::kLanes; ++lane) lanes[lane] = lanes[lane % R];
  return load(lanes);
}

// s[NK][R] = k . q for NK keys; `key` gives the address of each. Lane l of `unit` is what the products of row l % R
// are multiplied by where the queries are not.
template <class V, class Dot, int R, int NK, class Key>
FOVEAL_INLINE void decode_score_step(const typename V::T* q, int64_t q_stride, int64_t head_dim, V unit, const Key& key,
                                     typename V::T* s) {
  constexpr int kCount = NK * R;
  V acc[kCount];
#pragma GCC unroll 16
  for (int x = 0; x < kCount; ++x) acc[x] = zero<V>();
  int64_t d = 0;
  for (; d + Dot::kChunk <= head_dim; d += Dot::kChunk, q += V::kLanes) {
    V qd[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) qd[r] = load(q + r * q_stride);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const V kd = Dot::load_chunk(key(n) + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[n * R + r] = Dot::multiply_add(kd, qd[r], acc[n * R + r]);
    }
  }
  if (d < head_dim) {
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const V kd = Dot::load_chunk_n(key(n) + d, head_dim - d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[n * R + r] = Dot::multiply_add(kd, load(q + r * q_stride), acc[n * R + r]);
    }
  }
  if constexpr (kCount % V::kLanes == 0) {
#pragma GCC unroll 4
    for (int x = 0; x < kCount; x += V::kLanes)
      store(s + x, Dot::finish(Dot::sum_each(*reinterpret_cast<V(*)[V::kLanes]>(acc + x)), unit));
  } else {
    // The same tree as sum_each, so that a key's score does not depend on how many keys came with it.
    V padded[V::kLanes];
    for (int x = 0; x < V::kLanes; ++x) padded[x] = x < kCount ? acc[x] : zero<V>();
    alignas(64) typename V::T lanes[V::kLanes];
    store(lanes, Dot::finish(Dot::sum_each(padded), unit));
    for (int x = 0; x < kCount; ++x) s[x] = lanes[x];
  }
}

template <class V, class Dot, int R, class C>
static void decode_scores(const typename V::T* q, int64_t q_stride, int64_t head_dim, V unit, const Rows<C>& k,
                          int64_t n, typename V::T* s, Ahead<C>& ahead) {
  constexpr int kKeys = kDecodeAccumulators / R;
  const auto run = [&](const auto& key_from) __attribute__((always_inline)) {
    int64_t j = 0;
    for (; j + kKeys <= n; j += kKeys) {
      decode_score_step<V, Dot, R, kKeys>(q, q_stride, head_dim, unit, key_from(j), s + j * R);
      ahead.used(kKeys * head_dim);
    }
    for (; j < n; ++j) {
      decode_score_step<V, Dot, R, 1>(q, q_stride, head_dim, unit, key_from(j), s + j * R);
      ahead.used(head_dim);
    }
  };
  if (k.at != nullptr)
    run([at = k.at](int64_t j) { return [keys = at + j](int x) { return keys[x]; }; });
  else
    run([&k](int64_t j) { return [p = k.p + j * k.stride, stride = k.stride](int x) { return p + x * stride; }; });
}

// x[n][R] *= the scale of the page of keys [begin, begin + n). 0 stays 0 by any scale: masked weights do.
template <class V, int R>
static void multiply_by_page(const HeadTask& h, const float* scales, int64_t begin, int64_t n, typename V::T* x) {
  for (int64_t j = 0; j < n;) {
    const int64_t page = (begin + j) / h.page_size;
    const int64_t end = min64((page + 1) * h.page_size - begin, n);
    const V scale = broadcast<V>(scales[page]);
    for (int64_t c = j * R; c < end * R; c += V::kLanes) {
      const V old = widen_n(x + c, end * R - c);
      narrow_n(x + c, select(equal(old, zero<V>()), old, old * scale), end * R - c);
    }
    j = end;
  }
}

// o[R][NC vectors] = o * rescale + p^T v. With few sums to keep, keys go to several sets of them in turn, so that one
// addition need not wait for the last.
template <class V, int R, int NC, class C>
FOVEAL_INLINE void decode_value_step(const typename V::T* p, int64_t n, const Rows<C>& v, int64_t column, int64_t width,
                                     typename V::T* o, int64_t o_stride, const typename V::T* rescale,
                                     Ahead<C>& ahead) {
  constexpr int kSets = R * NC >= 8 ? 1 : 8 / (R * NC);
  V acc[kSets][R][NC];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      acc[0][r][c] = load(o + r * o_stride + c * V::kLanes) * broadcast<V>(rescale[r]);
#pragma GCC unroll 8
      for (int set = 1; set < kSets; ++set) acc[set][r][c] = zero<V>();
    }
  const auto add_key = [&](int64_t j, V(&sum)[R][NC]) __attribute__((always_inline)) {
    V vd[NC];
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const C* x = v.row(j) + column + c * V::kLanes;
      vd[c] = NC > 1 || width >= V::kLanes ? widen(x) : widen_n(x, width);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V w = broadcast<V>(p[j * R + r]);
#pragma GCC unroll 8
      for (int c = 0; c < NC; ++c) sum[r][c] = fma(w, vd[c], sum[r][c]);
    }
  };
  int64_t j = 0;
  for (; j + kSets <= n; j += kSets) {
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) add_key(j + set, acc[set]);
    ahead.used(kSets * width);
  }
  for (; j < n; ++j) {
    add_key(j, acc[0]);
    ahead.used(width);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
#pragma GCC unroll 3
      for (int half = kSets / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (int set = 0; set < half; ++set) acc[set][r][c] = acc[set][r][c] + acc[set + half][r][c];
      store(o + r * o_stride + c * V::kLanes, acc[0][r][c]);
    }
}

// As many columns at once as there are accumulators for, then half as many, and so on.
template <class V, int R, int NC, class C>
FOVEAL_INLINE void decode_columns(int64_t c, const typename V::T* p, int64_t n, const Rows<C>& v, int64_t value_dim,
                                  typename V::T* o, int64_t o_stride, const typename V::T* rescale, Ahead<C>& ahead) {
  if constexpr (NC > 1) {
    for (; c + NC * V::kLanes <= value_dim; c += NC * V::kLanes)
      decode_value_step<V, R, NC>(p, n, v, c, NC * V::kLanes, o + c, o_stride, rescale, ahead);
    decode_columns<V, R, NC / 2>(c, p, n, v, value_dim, o, o_stride, rescale, ahead);
  } else {
    for (; c < value_dim; c += V::kLanes)
      decode_value_step<V, R, 1>(p, n, v, c, min64(V::kLanes, value_dim - c), o + c, o_stride, rescale, ahead);
  }
}

template <class V, int R, class C>
static void decode_values(const typename V::T* p, int64_t n, const Rows<C>& v, int64_t value_dim, typename V::T* o,
                          int64_t o_stride, const typename V::T* rescale, Ahead<C>& ahead) {
  constexpr int kColumns = kDecodeAccumulators / R < 8 ? kDecodeAccumulators / R : 8;
  decode_columns<V, R, kColumns>(0, p, n, v, value_dim, o, o_stride, rescale, ahead);
}

// As add_values_guarded of the forward tile: weights with a sign bit are masked, and their values are not read into the
// sum.
template <class V, int R, class C>
static void decode_values_guarded(const typename V::T* p, int64_t n, const Rows<C>& v, int64_t value_dim,
                                  typename V::T* o, int64_t o_stride, const typename V::T* rescale) {
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < value_dim; c += V::kLanes) {
      typename V::T* x = o + r * o_stride + c;
      V acc = load(x) * broadcast<V>(rescale[r]);
      for (int64_t j = 0; j < n; ++j) {
        const typename V::T w = p[j * R + r];
        if (!__builtin_signbit(w))
          acc = fma(broadcast<V>(w), widen_strided<V>(v.row(j) + c, 1, min64(V::kLanes, value_dim - c)), acc);
      }
      store(x, acc);
    }
}

}  // namespace
}  // namespace foveal
