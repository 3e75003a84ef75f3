// What happens to the scores of a tile between the product and the softmax: soft cap, ALiBi, bias, mask, in this order.
//
// Each is one pass over s[n][NV vectors of rows], the scores of n keys in base 2 (times log2 e): a few percent of the
// block's work, paid only by who asks for it.
#pragma once

namespace foveal {
namespace {

template <class V, int NV>
static void apply_softcap(typename V::T* s, int64_t n, double softcap) {
  using T = typename V::T;
  const V cap = broadcast<V>(static_cast<T>(softcap * kLog2E));
  const V inverse = broadcast<V>(static_cast<T>(1.0 / (softcap * kLog2E)));
  for (int64_t x = 0; x < n * NV * V::kLanes; x += V::kLanes) store(s + x, cap * tanh(load(s + x) * inverse));
}

template <class V, int NV>
static void apply_alibi(const HeadTask& h, int64_t row_begin, int64_t key_begin, int64_t n, typename V::T* s) {
  using T = typename V::T;
  V slope[NV], distance[NV];
  for (int r = 0; r < NV; ++r) {
    alignas(64) T slopes[V::kLanes], offsets[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t row = row_begin + r * V::kLanes + lane;
      slopes[lane] = static_cast<T>(h.slopes[row % h.group] * kLog2E);
      offsets[lane] = static_cast<T>(h.q_offset + row / h.group - key_begin);
    }
    slope[r] = zero<V>() - load(slopes);
    distance[r] = load(offsets);
  }
  for (int64_t j = 0; j < n; ++j) {
    const V key = broadcast<V>(static_cast<T>(j));
    for (int r = 0; r < NV; ++r) {
      T* x = s + (j * NV + r) * V::kLanes;
      store(x, fma(slope[r], abs(distance[r] - key), load(x)));
    }
  }
}

// Of a finite bias, as much as stays finite in base 2: models mask by the lowest number of a dtype too, and where that
// is all that a row sees, it sees it. At -inf a key is not seen.
template <class V>
FOVEAL_INLINE V bounded_bias(V bias) {
  using T = typename V::T;
  const V most = broadcast<V>(kHighestScore<T> / static_cast<T>(kLog2E));
  const V bounded = max(zero<V>() - most, min(most, bias));
  return select(equal(abs(bias), zero<V>() - negative_infinity<V>()), bias, bounded);
}

template <class V, int NV>
static void add_bias(const HeadTask& h, int64_t row_begin, int64_t rows, int64_t key_begin, int64_t n,
                     typename V::T* s) {
  using T = typename V::T;
  const V log2e = broadcast<V>(static_cast<T>(kLog2E));
  for (int r = 0; r < NV; ++r) {
    for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
      const int64_t width = min64(V::kLanes, n - j0);
      V block[V::kLanes];
      for (int lane = 0; lane < V::kLanes; ++lane) {
        const int64_t row = row_begin + r * V::kLanes + lane;
        block[lane] = zero<V>();
        if (row >= row_begin + rows) continue;
        const int64_t offset =
            row / h.group * h.bias_stride_s + row % h.group * h.bias_stride_g + (key_begin + j0) * h.bias_stride_k;
        block[lane] = widen_any<V>(h.bias, h.bias_dtype, offset, h.bias_stride_k, width);
      }
      transpose(block);
      for (int64_t j = 0; j < width; ++j) {
        T* x = s + ((j0 + j) * NV + r) * V::kLanes;
        store(x, fma(bounded_bias(block[j]), log2e, load(x)));
      }
    }
  }
}

template <class V, int NV>
static void apply_bits(const uint64_t* bits, int64_t n, typename V::T* s) {
  for (int64_t j = 0; j < n; ++j)
    for (int r = 0; r < NV; ++r) {
      typename V::T* x = s + (j * NV + r) * V::kLanes;
      store(x, select(mask_from_bits<V>(bits[j] >> (r * V::kLanes)), load(x), negative_infinity<V>()));
    }
}

}  // namespace
}  // namespace foveal
