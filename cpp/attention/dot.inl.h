// How a query meets a key: the products of head_dim elements, kStep of them a multiply-add.
//
//   WidenedDot   one element a step, in the accumulator type; the scale is put on the queries beforehand
//   PairDot      two bfloat16 a step, by an instruction that multiplies pairs and adds both products to a float32; the
//   queries stay as
//                they are stored, and the scale comes after
//
// `multiply_add` serves both kernels: with queries in the lanes (a key element or pair broadcast) and with elements in
// the lanes (a chunk of kChunk elements of each; those of a key may be codes of an int8 cache).
#pragma once

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

template <class V, class S>
struct ScoreDotFor {
  using Type = WidenedDot<V, S>;
};

#ifdef FOVEAL_HAS_BF16_DOT
template <class V>
struct PairDot {
  using Key = BFloat16;
  static constexpr int kStep = 2;
  static constexpr int kChunk = 2 * V::kLanes;

  FOVEAL_INLINE static V multiply_add(V a, V b, V sum) { return dot_bf16(a, b, sum); }
  FOVEAL_INLINE static V broadcast_key(const Key* k) { return broadcast_pair(k); }
  FOVEAL_INLINE static V broadcast_last_key(const Key* k) {
    const BFloat16 pair[2] = {*k, {0}};
    return broadcast_pair(pair);
  }
  // kLanes pairs, zeros past n elements.
  FOVEAL_INLINE static V load_query(const BFloat16* q, int64_t stride, int64_t n, V) {
    if (stride == 1) return load_chunk_n(q, n);
    BFloat16 elements[kChunk] = {};
    for (int64_t c = 0; c < n && c < kChunk; ++c) elements[c] = q[c * stride];
    return load_pairs(elements);
  }
  FOVEAL_INLINE static typename V::T load_row(const BFloat16* q, int64_t stride, int64_t n, V scale,
                                              typename V::T* to) {
    return load_query_row<PairDot>(q, stride, n, scale, to);
  }
  template <class C>
  FOVEAL_INLINE static V load_chunk(const C* k) {
    return load_pairs(k);
  }
  template <class C>
  FOVEAL_INLINE static V load_chunk_n(const C* k, int64_t n) {
    return load_pairs_n(k, n);
  }
  FOVEAL_INLINE static V sum_each(V (&sums)[V::kLanes]) { return foveal::sum_each(sums); }
  FOVEAL_INLINE static V finish(V sum, V scale) { return sum * scale; }
};

template <>
struct ScoreDotFor<F32, BFloat16> {
  using Type = PairDot<F32>;
};
#endif

template <class V, class S>
using ScoreDot = typename ScoreDotFor<V, S>::Type;

}  // namespace
}  // namespace foveal
