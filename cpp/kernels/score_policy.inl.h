// What happens to the scores of a block between the product and the normaliser: soft cap, ALiBi, bias, then the mask.
//
// Scores are in base 2 (times log2 e), and lie as a lane map says (lanes.inl.h), so the many-rows, the few-rows and the
// backward kernel share this. Each policy is one pass over the block: a few percent of its work, paid only by who asks.
// A policy that bends scores (here the soft cap) also gives its slope, d(policy)/d(score), to the backward kernel.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/elementary.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/lanes.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Whether a policy after the bias bends the scores: of normalised sigmoid, log sigmoid.
FOVEAL_INLINE bool bends_biased_scores(const HeadTask& h) { return h.normalizer == Normalizer::kNormalizedSigmoid; }

// Whether any policy but the mask changes the scores of this head.
FOVEAL_INLINE bool changes_scores(const HeadTask& h) {
  return h.softcap > 0 || h.slopes != nullptr || h.bias != nullptr || bends_biased_scores(h);
}

// Whether a policy before the bias bends the scores, so that a score's gradient is not that of what becomes of it.
FOVEAL_INLINE bool bends_scores(const HeadTask& h) { return h.softcap > 0; }

// `size` scores; their slopes too where `slope` is not null.
template <class V>
static void apply_softcap(double softcap, int64_t size, typename V::T* s, typename V::T* slope) {
  using T = typename V::T;
  const V cap = broadcast<V>(static_cast<T>(softcap * kLog2E));
  const V inverse = broadcast<V>(static_cast<T>(1.0 / (softcap * kLog2E)));
  for (int64_t x = 0; x < size; x += V::kLanes) {
    const V t = tanh(load(s + x) * inverse);
    store(s + x, cap * t);
    if (slope != nullptr) store(slope + x, fma(zero<V>() - t, t, broadcast<V>(1)));
  }
}

template <class V, class Lanes>
static void apply_alibi(const HeadTask& h, const Lanes& lanes, int64_t key_begin, int64_t steps, typename V::T* s) {
  using T = typename V::T;
  V slope[Lanes::kVectors], distance[Lanes::kVectors];
  for (int r = 0; r < Lanes::kVectors; ++r) {
    alignas(64) T slopes[V::kLanes], offsets[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t row = lanes.row(r, lane);
      slopes[lane] = static_cast<T>(-h.slopes[row % h.group] * kLog2E);
      offsets[lane] = static_cast<T>(h.q_offset + row / h.group - key_begin - lanes.key(lane));
    }
    slope[r] = load(slopes);
    distance[r] = load(offsets);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const V key = broadcast<V>(static_cast<T>(step * Lanes::kKeys));
    for (int r = 0; r < Lanes::kVectors; ++r) {
      T* x = s + (step * Lanes::kVectors + r) * V::kLanes;
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

template <class V, class Lanes>
static void add_bias(const HeadTask& h, const Lanes& lanes, int64_t key_begin, int64_t n, typename V::T* s) {
  const V log2e = broadcast<V>(static_cast<typename V::T>(kLog2E));
  lanes.for_each_bias(h, key_begin, n, [=](int64_t x, V bias) __attribute__((always_inline)) {
    if constexpr (Lanes::kFusesBias)
      store(s + x, fma(bounded_bias(bias), log2e, load(s + x)));
    else
      store(s + x, load(s + x) + bounded_bias(bias) * log2e);
  });
}

// s -> log sigmoid(s), so that softmax makes sigmoid(s) / sum sigmoid(s) of it; and its slope, 1 - sigmoid(s).
template <class V>
static void apply_log_sigmoid(int64_t size, typename V::T* s, typename V::T* slope) {
  for (int64_t x = 0; x < size; x += V::kLanes) {
    const V score = load(s + x), t = exp2_nonpositive(zero<V>() - abs(score)), one = broadcast<V>(1);
    store(s + x, min(zero<V>(), score) - log1p(t) * broadcast<V>(static_cast<typename V::T>(kLog2E)));
    if (slope != nullptr) store(slope + x, select(sign_mask(score), one, t) / (one + t));
  }
}

// Every policy but the mask, to the scores of keys [key_begin, key_begin + n). Where `slope` is not null, it gets the
// slopes of what bends scores before the bias, `late_slope` of what bends them after it.
template <class V, class Lanes>
static void apply_policies(const HeadTask& h, const Lanes& lanes, int64_t key_begin, int64_t n, typename V::T* s,
                           typename V::T* slope = nullptr, typename V::T* late_slope = nullptr) {
  const int64_t steps = lanes.steps(n);
  if (h.softcap > 0) apply_softcap<V>(h.softcap, steps * Lanes::kVectors * V::kLanes, s, slope);
  if (h.slopes != nullptr) apply_alibi<V>(h, lanes, key_begin, steps, s);
  if (h.bias != nullptr) add_bias<V>(h, lanes, key_begin, n, s);
  if (bends_biased_scores(h)) apply_log_sigmoid<V>(steps * Lanes::kVectors * V::kLanes, s, late_slope);
}

// The mask, last: scores of pairs that are not seen become -inf. `bits` null: all are seen. visit(x, r, score) gets
// every vector of scores on the way, where it lies and which vector of its step it is.
template <class V, class Lanes, class Visit>
FOVEAL_INLINE void apply_mask(const Lanes& lanes, const uint64_t* bits, int64_t n, typename V::T* s,
                              const Visit& visit) {
  for (int64_t step = 0; step < lanes.steps(n); ++step)
    for (int r = 0; r < Lanes::kVectors; ++r) {
      const int64_t x = (step * Lanes::kVectors + r) * V::kLanes;
      V score = load(s + x);
      if (bits != nullptr) {
        score = select(mask_from_bits<V>(lanes.seen(bits, step, r)), score, negative_infinity<V>());
        store(s + x, score);
      }
      visit(x, r, score);
    }
}

}  // namespace
}  // namespace foveal
