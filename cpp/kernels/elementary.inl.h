// exp2, tanh, log1p and log2 over vectors.
//
// 2^x = 2^n * 2^f with n = round(x), f = x - n in [-1/2, 1/2], and 2^f = 1 + f*q(f), q a minimax polynomial (Remez,
// relative error of 2^f): degree 5 for float (2.6e-9, below rounding), 10 for double (1.8e-17). 2^0 is exactly 1, so a
// row whose maximum did not move is rescaled without error. tanh goes through expm1, whose leading 1 never enters the
// polynomial, and so keeps its relative accuracy down to zero.
#pragma once

#include "simd/vectors.h"

namespace foveal {
namespace {

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kTerms = 6;
  static constexpr float kQ[kTerms] = {0.6931472149680279f,   0.2402265278288774f,   0.05550310551013797f,
                                       0.009617692972993062f, 0.001340664390235176f, 0.00015594678161326619f};
  static constexpr float kLowest = -200.0f;  // 2^kLowest is 0 in float
  static constexpr float kTanhLimit = 10.0f;
};

template <>
struct Exp2<double> {
  static constexpr int kTerms = 11;
  static constexpr double kQ[kTerms] = {0.69314718055994569675,     0.24022650695910098007,   0.055504108664790394552,
                                        0.0096181291076070023796,   0.0013333558153439964747, 0.0001540353044157213033,
                                        0.000015252727385193868197, 1.3215442675329822143e-6, 1.0180647659234138888e-7,
                                        7.0725704128144235096e-9,   4.078071929588336665e-10};
  static constexpr double kLowest = -1500.0;
  static constexpr double kTanhLimit = 22.0;
};

// q(f) = (2^f - 1) / f for |f| <= 1/2.
template <class V>
FOVEAL_INLINE V exp2_quotient(V f) {
  using E = Exp2<typename V::T>;
  V q = broadcast<V>(E::kQ[E::kTerms - 1]);
#pragma GCC unroll 16
  for (int i = E::kTerms - 2; i >= 0; --i) q = fma(q, f, broadcast<V>(E::kQ[i]));
  return q;
}

// 2^x for x <= 0; -inf gives 0, NaN gives NaN.
template <class V>
FOVEAL_INLINE V exp2_nonpositive(V x) {
  x = max(broadcast<V>(Exp2<typename V::T>::kLowest), x);
  const V n = round(x);
  const V f = x - n;
  return exp2_scale(fma(exp2_quotient<V>(f), f, broadcast<V>(1)), n);
}

// log(1 + t) for 0 <= t <= 1, to rounding of itself: 2 atanh(z) with z = t / (2 + t) at most 1/3, by its series.
template <class V>
FOVEAL_INLINE V log1p(V t) {
  constexpr int kTerms = sizeof(typename V::T) == 4 ? 8 : 17;
  const V z = t / (t + broadcast<V>(2)), square = z * z;
  V sum = broadcast<V>(static_cast<typename V::T>(1.0 / (2 * kTerms - 1)));
#pragma GCC unroll 32
  for (int k = kTerms - 2; k >= 1; --k)
    sum = fma(sum, square, broadcast<V>(static_cast<typename V::T>(1.0 / (2 * k + 1))));
  return (z + z) * fma(sum, square, broadcast<V>(1));
}

// log2(x) for x >= 0, to 2 units in the last place of the result or of 1: what is below the smallest normal number
// counts as that, 0 included. With x = m 2^e and m in [1/sqrt 2, sqrt 2), e + 2 log2(e) atanh((m - 1) / (m + 1)), by
// its series, |argument| <= 0.172.
template <class V>
FOVEAL_INLINE V log2(V x) {
  using T = typename V::T;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 11;
  constexpr double kTwoLog2E = 2.8853900817779268;
  V e;
  const V m =
      split(max(broadcast<V>(sizeof(T) == 4 ? static_cast<T>(__FLT_MIN__) : static_cast<T>(__DBL_MIN__)), x), e);
  const V one = broadcast<V>(1);
  const auto high = greater(m, broadcast<V>(static_cast<T>(1.4142135623730951)));
  const V reduced = select(high, m * broadcast<V>(static_cast<T>(0.5)), m);
  const V z = (reduced - one) / (reduced + one), square = z * z;
  V sum = broadcast<V>(static_cast<T>(kTwoLog2E / (2 * kTerms - 1)));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = fma(sum, square, broadcast<V>(static_cast<T>(kTwoLog2E / (2 * k + 1))));
  return fma(z, sum, select(high, e + one, e));
}

template <class V>
FOVEAL_INLINE V tanh(V x) {
  using T = typename V::T;
  const V limit = broadcast<V>(Exp2<T>::kTanhLimit);
  x = max(zero<V>() - limit, min(limit, x));
  // e = exp(2x) - 1 = 2^n (2^f - 1) + (2^n - 1), then tanh = e / (e + 2).
  const V t = x * broadcast<V>(static_cast<T>(2.885390081777926815));
  const V n = round(t);
  const V pow = exp2_scale(broadcast<V>(1), n);
  const V f = t - n;
  const V e = fma(pow, exp2_quotient<V>(f) * f, pow - broadcast<V>(1));
  return e / (e + broadcast<V>(2));
}

}  // namespace
}  // namespace foveal
