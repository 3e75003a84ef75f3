// The threshold of a row, exactly: which keys can have weight at all, and a search that ends by itself.
//
// A normaliser N with a threshold weighs a key by how far its argument lies above tau, the threshold of the row. The
// argument is N::kArgument times the score (in base 2), less the row's largest; so it is at most 0, and tau lies in
// [-1, 0): a key whose argument is at most -1 has weight 0. Of 2048 standard normal scores 0.6% lie that near to the
// largest under sparsemax, 7% under 1.5-entmax. So a vector of rows keeps a list of the keys that any of its rows may
// still weigh (AdaSplash, Goncalves et al. 2025, skips blocks for the same reason), which shrinks as bounds get better,
// and everything after the scores costs as many steps as the list is long.
//
// What a row gets does not depend on its neighbours: keys that are on the list for their sake add zeros to its sums,
// whose order is that of the keys, and a lane whose search has ended stays as it is.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/mask.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// How far the argument of a score lies above the threshold; 0 below.
template <class N, class V>
FOVEAL_INLINE V above_threshold(V score, V shift, V threshold) {
  const V argument = (score - shift) * broadcast<V>(static_cast<typename V::T>(N::kArgument));
  return max(zero<V>(), argument - threshold);
}

// Sums over the keys above the threshold that is tried, of how far they are above it.
template <class V>
struct ThresholdSums {
  V count, first, second;  // of powers 0, 1 and 2
};

// One search a lane. It ends where the keys above a threshold are as many as those that it was solved from, hence the
// same; solving once more refines it. It ends, too, where rounding leaves no better threshold to try.
template <class V>
struct ThresholdSearch {
  V at = broadcast<V>(-1);      // the threshold to try
  V lower = broadcast<V>(-1);   // no threshold below it
  V better = broadcast<V>(-1);  // one above `lower` which is not too high either
  V count = broadcast<V>(-1);   // of the keys that `at` was solved from; -1: it is no solution
  V open = broadcast<V>(1);     // 1 while the lane is searched, then 0

  FOVEAL_INLINE bool ended() const { return lane_bits(greater(open, zero<V>())) == 0; }

  // The next threshold is the solution for the keys above this one, and known not to be too high. Nothing above it (a
  // row without keys): it stays.
  FOVEAL_INLINE void rise(const ThresholdSums<V>& sums, V solved) {
    const V next = select(equal(sums.first, zero<V>()), at, max(at, solved));
    move(sums, next, solved, greater(next, at));
    lower = at;
  }

  // `f` falls through 0 at the threshold that is sought. From below, `solved` may be too high, or NaN where there is no
  // solution, and `newton` is not too high; from above, `solved` is not.
  FOVEAL_INLINE void close_in(const ThresholdSums<V>& sums, V f, V solved, V newton) {
    const auto too_high = greater(zero<V>(), f);
    lower = select(too_high, lower, at);
    better = select(too_high, better, newton);
    const V next = select(too_high, max(better, solved), select(equal(solved, solved), solved, newton));
    move(sums, next, solved, greater(next, select(too_high, lower, at)));
  }

 private:
  template <class M>
  FOVEAL_INLINE void move(const ThresholdSums<V>& sums, V next, V solved, M goes_on) {
    const auto searched = greater(open, zero<V>());
    open = select(goes_on, open, zero<V>());
    open = select(equal(next, at), zero<V>(), open);
    at = select(searched, next, at);
    open = select(equal(sums.count, count), zero<V>(), open);
    count = select(equal(next, solved), sums.count, broadcast<V>(-1));
  }
};

// Keys of a vector of rows, in ascending order, with a vector each: scores, then arguments, then weights.
template <class V>
struct KeyList {
  typename V::T* values;
  int64_t* keys;
  int64_t size;

  // Appends, to stay if `stays`: without a branch, which nobody could predict. There is room for all keys and one more.
  FOVEAL_INLINE void offer(int64_t key, V value, bool stays) {
    store(values + size * V::kLanes, value);
    keys[size] = key;
    size += stays;
  }

  // visit(value) -> what takes its place, and whether the key stays.
  template <class Visit>
  FOVEAL_INLINE void filter(const Visit& visit) {
    const int64_t n = size;
    size = 0;
    for (int64_t e = 0; e < n; ++e) {
      const auto [value, stays] = visit(load(values + e * V::kLanes));
      offer(keys[e], value, stays);
    }
  }
};

// Whether any lane is at least `bound`, or NaN.
template <class V>
FOVEAL_INLINE bool reaches(V x, V bound) {
  return lane_bits(greater(bound, x)) != low_bits(V::kLanes);
}

// The least score that may have weight where `highest` is the largest so far; +inf for a row that has seen nothing. A
// little lower than it need be, since arguments are rounded: whether a key stays must not depend on the neighbours.
template <class N, class V>
FOVEAL_INLINE V least_score(V highest) {
  const V reach = broadcast<V>(static_cast<typename V::T>((1 + 0x1p-10) / N::kArgument));
  return select(equal(highest, negative_infinity<V>()), zero<V>() - negative_infinity<V>(), highest - reach);
}

template <class V>
struct Kept {
  V value;
  bool stays;
};

// From the scores of a list to the arguments of the keys that may have weight, and the threshold of each row. `shift`:
// the largest scores, +inf where there is none. NaN for a row with a score of NaN or +inf.
template <class N, class V>
static V find_threshold(KeyList<V>& list, V shift) {
  const V factor = broadcast<V>(static_cast<typename V::T>(N::kArgument)), one = broadcast<V>(1);
  list.filter([&](V score) __attribute__((always_inline)) {
    const V argument = (score - shift) * factor;
    return Kept<V>{argument, reaches(argument, zero<V>() - one)};
  });
  ThresholdSearch<V> search;
  while (!search.ended()) {
    ThresholdSums<V> sums = {zero<V>(), zero<V>(), zero<V>()};
    list.filter([&](V argument) __attribute__((always_inline)) {
      const V x = max(zero<V>(), argument - search.at);
      sums.count = sums.count + select(greater(x, zero<V>()), one, zero<V>());
      sums.first = sums.first + x;
      sums.second = fma(x, x, sums.second);
      return Kept<V>{argument, reaches(argument, search.lower)};
    });
    N::next(sums, search);
  }
  return search.at;
}

}  // namespace
}  // namespace foveal
