// The products of bfloat16 queries where an instruction multiplies pairs of them and adds both products to a float32.
//
// The one specialisation of `Products`, for instruction sets that define FOVEAL_HAS_BF16_DOT; kernel_table.cc includes
// it for them alone.
#pragma once

#include "kernels/code_pairs.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/value_pairs.inl.h"
#include "simd/vectors.h"

#ifdef FOVEAL_HAS_BF16_DOT

namespace foveal {
namespace {

// Two elements a step; the queries stay as they are stored, and the scale comes after.
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

template <class C, int R>
struct FewRowsPairs {  // fewer than four rows: memory is the bound, not the multiply-adds
  using Score = PairDot<F32>;
  using Value = void;
};
template <int R>
  requires(R >= 4)
struct FewRowsPairs<BFloat16, R> {
  using Score = PairDot<F32>;
  using Value = BFloat16Pairs;
};
template <int R>
  requires(R >= 4)
struct FewRowsPairs<int8_t, R> {
  using Score = CodeDot;
  using Value = CodePairs;
};

template <>
struct Products<F32, BFloat16> {
  using Score = PairDot<F32>;
  template <class C, int R>
  using FewRowsScore = typename FewRowsPairs<C, R>::Score;
  template <class C, int R>
  using FewRowsValue = typename FewRowsPairs<C, R>::Value;
  static constexpr int64_t kRoundingRows = 3;  // which take the kernel of four
};

}  // namespace
}  // namespace foveal

#endif  // FOVEAL_HAS_BF16_DOT
