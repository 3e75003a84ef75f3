// How a query meets a key: the products of head_dim elements, kStep of them a multiply-add; and `Products`, which says
// for queries of S what every kernel multiplies by.
//
// `multiply_add` serves both kernels: with queries in the lanes (a key element or pair broadcast) and with elements in
// the lanes (a chunk of kChunk elements of each; those of a key may be codes of an int8 cache).
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

template <class V>
FOVEAL_INLINE V score_scale(const HeadTask& h) {
  return broadcast<V>(static_cast<typename V::T>(h.scale * kLog2E));
}

// A query as chunks of Dot, of which `to` has room for a whole number. Returns what the products must be multiplied by.
template <class Dot, class V, class S>
FOVEAL_INLINE typename V::T load_query_row(const S* q, int64_t stride, int64_t n, V scale, typename V::T* to) {
  for (int64_t d = 0; d < n; d += Dot::kChunk, to += V::kLanes)
    store(to, Dot::load_query(q + d * stride, stride, n - d, scale));
  alignas(64) typename V::T lanes[V::kLanes];
  store(lanes, scale);
  return lanes[0];
}

// One element a step, in the accumulator type; the scale is put on the queries beforehand.
template <class V, class S>
struct WidenedDot {
  using Key = typename V::T;  // what the forward tile broadcasts
  static constexpr int kStep = 1;
  static constexpr int kChunk = V::kLanes;

  FOVEAL_INLINE static V multiply_add(V a, V b, V sum) { return fma(a, b, sum); }
  FOVEAL_INLINE static V broadcast_key(const Key* k) { return broadcast<V>(*k); }
  FOVEAL_INLINE static V broadcast_last_key(const Key* k) { return broadcast<V>(*k); }
  FOVEAL_INLINE static V load_query(const S* q, int64_t stride, int64_t n, V scale) {
    return widen_strided<V>(q, stride, n) * scale;
  }
  FOVEAL_INLINE static typename V::T load_row(const S* q, int64_t stride, int64_t n, V scale, typename V::T* to) {
    return load_query_row<WidenedDot>(q, stride, n, scale, to);
  }
  template <class C>
  FOVEAL_INLINE static V load_chunk(const C* k) {
    return widen(k);
  }
  template <class C>
  FOVEAL_INLINE static V load_chunk_n(const C* k, int64_t n) {
    return widen_n(k, n);
  }
  FOVEAL_INLINE static V sum_each(V (&sums)[V::kLanes]) { return foveal::sum_each(sums); }
  FOVEAL_INLINE static V finish(V sum, V) { return sum; }
};

// The arithmetic of the matrix products of queries stored as S. An instruction set that multiplies in another way
// specialises this, and nothing else (bfloat16_products.inl.h).
template <class V, class S>
struct Products {
  // Queries and keys of many rows, and all products of the backward pass.
  using Score = WidenedDot<V, S>;
  // R queries and keys stored as C.
  template <class C, int R>
  using FewRowsScore = Score;
  // R rows of weights and values stored as C, by pairs of keys (value_pairs.inl.h); void: one key after the other.
  template <class C, int R>
  using FewRowsValue = void;
  // From so many rows on, FewRowsValue rounds weights to the stored type; 0: never.
  static constexpr int64_t kRoundingRows = 0;
};

template <class V, class S>
using ScoreDot = typename Products<V, S>::Score;

}  // namespace
}  // namespace foveal
