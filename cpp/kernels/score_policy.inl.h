// What happens to the scores of a block between the product and the normaliser: soft cap, ALiBi, bias, gate, span, then
// the mask.
//
// Scores are in base 2 (times log2 e), and lie as a lane map says (lanes.inl.h), so the many-rows, the few-rows and the
// backward kernel share this. Each policy is one pass over the block: a few percent of its work, paid only by who asks.
// A policy that bends scores (soft cap, gate, log sigmoid) also gives its slope, d(policy)/d(score), to the backward
// kernel, and one with parameters of its own (gate, span) what their gradients are made of.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/elementary.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/lanes.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Whether the last policy is log sigmoid, which makes softmax normalised sigmoid.
FOVEAL_INLINE bool takes_log_sigmoid(const HeadTask& h) { return h.normalizer == Normalizer::kNormalizedSigmoid; }

FOVEAL_INLINE bool has_gate(const HeadTask& h) { return h.gate_taus != nullptr; }
FOVEAL_INLINE bool has_span(const HeadTask& h) { return h.spans != nullptr; }

// Whether any policy but the mask changes the scores of this head.
FOVEAL_INLINE bool changes_scores(const HeadTask& h) {
  return h.softcap > 0 || h.slopes != nullptr || h.bias != nullptr || has_gate(h) || has_span(h) ||
         takes_log_sigmoid(h);
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

// What the backward pass reads of policies, for every score of a block; null: not asked for.
template <class T>
struct PolicyGradients {
  T* softcap = nullptr;        // the slope
  T* gate = nullptr;           // the slope less 1, which is -d(gate)/d(tau)
  T* gate_argument = nullptr;  // (s - tau) / T, whose product with the former is -d(gate)/d(T)
  T* span = nullptr;           // d(span)/d(z)
  T* log_sigmoid = nullptr;    // the slope
};

constexpr int64_t kPolicyGradients = 5;

// visit(array) for those that are asked for.
template <class T, class Visit>
FOVEAL_INLINE void for_each_array(const PolicyGradients<T>& g, const Visit& visit) {
  T* const all[kPolicyGradients] = {g.softcap, g.gate, g.gate_argument, g.span, g.log_sigmoid};
  for (T* x : all)
    if (x != nullptr) visit(x);
}

// log2 sigmoid of an argument in base 2, by t = 2^-|x|; and what is left of 1, 1 - sigmoid.
template <class V>
FOVEAL_INLINE V log_sigmoid(V x, V t) {
  return min(zero<V>(), x) - log1p(t) * broadcast<V>(static_cast<typename V::T>(kLog2E));
}
template <class V>
FOVEAL_INLINE V rest_of_sigmoid(V x, V t) {
  const V one = broadcast<V>(1);
  return select(sign_mask(x), one, t) / (one + t);
}

// s -> s + log sigmoid((s - tau) / T), tau of the row and T of the head.
template <class V, class Lanes>
static void apply_gate(const HeadTask& h, const Lanes& lanes, int64_t steps, typename V::T* s,
                       const PolicyGradients<typename V::T>& gradients) {
  using T = typename V::T;
  V tau[Lanes::kVectors], inverse[Lanes::kVectors];
  for (int r = 0; r < Lanes::kVectors; ++r) {
    alignas(64) T taus[V::kLanes], inverses[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t row = min64(lanes.row(r, lane), lanes.row_begin + lanes.rows - 1);
      taus[lane] = static_cast<T>(h.gate_taus[row] * kLog2E);
      inverses[lane] = static_cast<T>(1.0 / h.gate_temperatures[row % h.group]);
    }
    tau[r] = load(taus);
    inverse[r] = load(inverses);
  }
  const V ln2 = broadcast<V>(static_cast<T>(kLn2)), least = zero<V>() - broadcast<V>(kHighestScore<T>);
  for (int64_t step = 0; step < steps; ++step)
    for (int r = 0; r < Lanes::kVectors; ++r) {
      const int64_t at = (step * Lanes::kVectors + r) * V::kLanes;
      const V score = load(s + at), x = (score - tau[r]) * inverse[r];
      const V t = exp2_nonpositive(zero<V>() - abs(x));
      store(s + at, score + log_sigmoid(x, t));
      if (gradients.gate == nullptr) continue;
      store(gradients.gate + at, rest_of_sigmoid(x, t) * inverse[r]);
      store(gradients.gate_argument + at, max(least, x) * ln2);  // at -inf a key is not seen
    }
}

// s -> s + log clamp((ramp + z - distance) / ramp, 0, 1), z of the head.
template <class V, class Lanes>
static void apply_span(const HeadTask& h, const Lanes& lanes, int64_t key_begin, int64_t steps, typename V::T* s,
                       const PolicyGradients<typename V::T>& gradients) {
  using T = typename V::T;
  const V one = broadcast<V>(1), inverse = broadcast<V>(static_cast<T>(1.0 / h.span_ramp));
  V end[Lanes::kVectors], position[Lanes::kVectors];
  bool within_all = gradients.span == nullptr;  // every key of the block, for every row: nothing to add
  for (int r = 0; r < Lanes::kVectors; ++r) {
    alignas(64) T ends[V::kLanes], positions[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t row = lanes.row(r, lane);
      ends[lane] = static_cast<T>(h.span_ramp + h.spans[row % h.group]);
      positions[lane] = static_cast<T>(h.q_offset + row / h.group - key_begin - lanes.key(lane));
    }
    end[r] = load(ends);
    position[r] = load(positions);
    const V last = broadcast<V>(static_cast<T>(steps * Lanes::kKeys));
    const V farthest = max(abs(position[r]), abs(position[r] - last));
    within_all &= lane_bits(greater(broadcast<V>(static_cast<T>(h.span_ramp)), end[r] - farthest)) == 0 &&
                  lane_bits(equal(end[r], end[r])) == low_bits(V::kLanes);
  }
  if (within_all) return;
  for (int64_t step = 0; step < steps; ++step) {
    const V key = broadcast<V>(static_cast<T>(step * Lanes::kKeys));
    for (int r = 0; r < Lanes::kVectors; ++r) {
      const int64_t at = (step * Lanes::kVectors + r) * V::kLanes;
      const V left = end[r] - abs(position[r] - key), share = left * inverse;
      const auto inside = greater(share, zero<V>()), within = greater(share, one);
      const V part = select(within, one, share);
      store(s + at, select(inside, load(s + at) + log2(part), part + negative_infinity<V>()));  // NaN stays
      if (gradients.span != nullptr)
        store(gradients.span + at, select(within, zero<V>(), select(inside, one / left, zero<V>())));
    }
  }
}

// s -> log sigmoid(s), so that softmax makes sigmoid(s) / sum sigmoid(s) of it; and its slope, 1 - sigmoid(s).
template <class V>
static void apply_log_sigmoid(int64_t size, typename V::T* s, typename V::T* slope) {
  for (int64_t x = 0; x < size; x += V::kLanes) {
    const V score = load(s + x), t = exp2_nonpositive(zero<V>() - abs(score));
    store(s + x, log_sigmoid(score, t));
    if (slope != nullptr) store(slope + x, rest_of_sigmoid(score, t));
  }
}

// Every policy but the mask, to the scores of keys [key_begin, key_begin + n).
template <class V, class Lanes>
static void apply_policies(const HeadTask& h, const Lanes& lanes, int64_t key_begin, int64_t n, typename V::T* s,
                           const PolicyGradients<typename V::T>& gradients = {}) {
  const int64_t steps = lanes.steps(n);
  if (h.softcap > 0) apply_softcap<V>(h.softcap, steps * Lanes::kVectors * V::kLanes, s, gradients.softcap);
  if (h.slopes != nullptr) apply_alibi<V>(h, lanes, key_begin, steps, s);
  if (h.bias != nullptr) add_bias<V>(h, lanes, key_begin, n, s);
  if (has_gate(h)) apply_gate<V>(h, lanes, steps, s, gradients);
  if (has_span(h)) apply_span<V>(h, lanes, key_begin, steps, s, gradients);
  if (takes_log_sigmoid(h)) apply_log_sigmoid<V>(steps * Lanes::kVectors * V::kLanes, s, gradients.log_sigmoid);
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
