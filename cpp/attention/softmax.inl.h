// The pieces of the online softmax that every kernel shares: base-2 logarithms, and rows that have seen no key.
//
// A row's state is (max, sum): the largest score so far and the sum of 2^(score - max). It starts at (-inf, 0), or at
// (sink, 1) with a sink, a key without a value that every row sees first. A row whose max is still -inf has seen
// nothing: its weights are 0, and so is its output.
#pragma once

namespace foveal {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

// The largest finite score (in base 2): so little below the largest number that scores of an ordinary size may still be
// added to it.
template <class T>
constexpr T kHighestScore =
    static_cast<T>(0.999998) * (sizeof(T) == 4 ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__));

constexpr int64_t kKeyBlock = 128;  // keys a block; blocks begin at multiples of it, whatever range is asked for

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class V>
FOVEAL_INLINE V negative_infinity() {
  return broadcast<V>(-static_cast<typename V::T>(__builtin_inf()));
}

// What to subtract from the scores of a row: its max, or 0 where that would be -inf - -inf.
template <class V>
FOVEAL_INLINE V or_zero_if_unseen(V highest) {
  return select(equal(highest, negative_infinity<V>()), zero<V>(), highest);
}

template <class V>
FOVEAL_INLINE V inverse_or_zero(V sum) {
  return select(equal(sum, zero<V>()), zero<V>(), broadcast<V>(1) / sum);
}

// The state of a row before its first key.
template <class T>
FOVEAL_INLINE void begin_row(const HeadTask& h, int64_t row, bool with_sink, T* max, T* sum) {
  const double sink = with_sink && h.sinks != nullptr ? h.sinks[row % h.group] * kLog2E : -__builtin_inf();
  *max = static_cast<T>(sink);
  *sum = *max == -static_cast<T>(__builtin_inf()) ? T{0} : T{1};
}

// Scratch is one aligned block, handed out from its front.
template <class T>
struct Arena {
  T* next;

  FOVEAL_INLINE T* take(int64_t n) {
    T* p = next;
    next += round_up(n, 64 / static_cast<int64_t>(sizeof(T)));
    return p;
  }
};

}  // namespace
}  // namespace foveal
