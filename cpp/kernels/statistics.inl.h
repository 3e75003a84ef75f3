// Statistics of where a row looks, beside its output: the entropy of its weights, what they sum to, the largest, and
// whose it is.
//
// With p_j = w_j / sum w the entropy is  H = -sum p_j log p_j = log(sum w) - (sum w_j log w_j) / (sum w), so two sums
// do, over the same blocks as those of the values. Under softmax log2 w_j is the score less the row's base, which is at
// hand beside the weight; elsewhere it is taken of the weight.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/elementary.inl.h"
#include "kernels/kernel_table.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// What a vector of rows carries from block to block, in units of the weights so far. `highest`: the largest score.
enum StatMember { kStatSum, kStatLogs, kStatHighest, kStatMembers };

// The state of a tile's rows: [kStatMembers][rows], and the key of the largest score. Null where nobody asks.
template <class V>
struct TileStats {
  typename V::T* state = nullptr;
  int64_t* argmax = nullptr;
  typename V::T* least_top = nullptr;  // the least weight among a row's heaviest, 0 while there are fewer
  int64_t stride = 0;

  FOVEAL_INLINE typename V::T* member(StatMember m, int r) const { return state + m * stride + r * V::kLanes; }

  void begin() const {
    for (int64_t x = 0; x < stride; ++x) {
      state[kStatSum * stride + x] = state[kStatLogs * stride + x] = 0;
      state[kStatHighest * stride + x] = -static_cast<typename V::T>(__builtin_inf());
      argmax[x] = -1;
      least_top[x] = 0;
    }
  }
};

// The first of n keys whose score is the block's highest, for the rows where that is above what they had.
template <class V, int NV>
static void find_argmax(const TileStats<V>& stats, int64_t key_begin, int64_t n, const typename V::T* s,
                        const V (&highest)[NV]) {
  using T = typename V::T;
  for (int r = 0; r < NV; ++r) {
    const V before = load(stats.member(kStatHighest, r));
    uint64_t better = lane_bits(greater(highest[r], before));
    if (better == 0) continue;
    V first = zero<V>();
    for (int64_t j = n - 1; j >= 0; --j)
      first = select(equal(load(s + (j * NV + r) * V::kLanes), highest[r]), broadcast<V>(static_cast<T>(j)), first);
    alignas(64) T lanes[V::kLanes];
    store(lanes, first);
    for (int lane = 0; lane < V::kLanes; ++lane)
      if (better >> lane & 1) stats.argmax[r * V::kLanes + lane] = key_begin + static_cast<int64_t>(lanes[lane]);
    store(stats.member(kStatHighest, r), select(greater(highest[r], before), highest[r], before));
  }
}

// The sums over a block of weights w[n][NV], which need no base.
template <class V, int NV>
static void add_weights(const TileStats<V>& stats, const typename V::T* w, int64_t n) {
  for (int r = 0; r < NV; ++r) {
    V sum = load(stats.member(kStatSum, r)), logs = load(stats.member(kStatLogs, r));
    for (int64_t j = 0; j < n; ++j) {
      const V x = load(w + (j * NV + r) * V::kLanes);
      sum = sum + x;
      logs = fma(x, log2(x), logs);
    }
    store(stats.member(kStatSum, r), sum);
    store(stats.member(kStatLogs, r), logs);
  }
}

// Of final weights w[n][NV], 0 in the lanes beyond the rows: what each key gets, summed over the rows of each head.
template <class V, int NV>
static void add_key_mass(const RowTask& task, int64_t row_begin, int64_t rows, int64_t key_begin, int64_t n,
                         const typename V::T* w) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  T* mass = static_cast<T*>(task.key_mass) + key_begin;
  for (int64_t j = 0; j < n; ++j) {
    const T* x = w + j * NV * V::kLanes;
    if (h.group == 1) {
      V sum = load(x);
      for (int r = 1; r < NV; ++r) sum = sum + load(x + r * V::kLanes);
      mass[j] += reduce_add(sum);
      continue;
    }
    int64_t head = row_begin % h.group;
    for (int64_t row = 0; row < rows; ++row) {
      mass[head * h.kv_len + j] += x[row];
      if (++head == h.group) head = 0;
    }
  }
}

// A key among the heaviest of a row, of which `keys` and `weights` have the best `count` so far, heaviest first; equal
// ones stay in the order in which they come. Returns the least of them.
template <class T>
static T offer_top(int64_t* keys, T* weights, int64_t count, int64_t key, T weight) {
  int64_t at = count - 1;
  for (; at > 0 && weights[at - 1] < weight; --at) {
    weights[at] = weights[at - 1];
    keys[at] = keys[at - 1];
  }
  weights[at] = weight;
  keys[at] = key;
  return weights[count - 1];
}

// Of the same weights, in ascending order of the keys: key_at(j) is that of w[j]. `first` is the first of the rows
// among those of the task.
template <class V, int NV, class KeyAt>
static void find_top(const RowTask& task, const TileStats<V>& stats, int r_begin, int64_t first, int64_t n,
                     const typename V::T* w, const KeyAt& key_at) {
  using T = typename V::T;
  for (int r = 0; r < NV; ++r) {
    T* least = stats.least_top + (r_begin + r) * V::kLanes;
    for (int64_t j = 0; j < n; ++j) {
      const T* x = w + (j * NV + r) * V::kLanes;
      uint64_t better = lane_bits(greater(load(x), load(least)));
      for (int lane = 0; better != 0; ++lane, better >>= 1) {
        if ((better & 1) == 0) continue;
        const int64_t row = first + r * V::kLanes + lane;
        least[lane] = offer_top(task.top_keys + row * task.top_k, static_cast<T*>(task.top_weights) + row * task.top_k,
                                task.top_k, key_at(j), x[lane]);
      }
    }
  }
}

// The statistics of a vector of rows, member by member as RowStat has them; `unit`: what a weight of 1 is worth in the
// end, `largest` the largest weight in the same units as the sums.
template <class V>
FOVEAL_INLINE void finish_statistics(V sum, V logs, V largest, V unit, V threshold, typename V::T* to, int64_t stride) {
  const auto none = equal(sum * unit, zero<V>());
  const V entropy = (log2(sum) - logs / sum) * broadcast<V>(static_cast<typename V::T>(kLn2));
  store(to + kRowEntropy * stride, select(none, zero<V>(), max(zero<V>(), entropy)));
  store(to + kRowMass * stride, sum * unit);
  const V greatest = select(equal(sum, sum), largest, sum);  // a largest may have passed by NaN
  store(to + kRowMaxWeight * stride, select(none, zero<V>(), greatest * unit));
  store(to + kRowThreshold * stride, threshold);
}

}  // namespace
}  // namespace foveal
