// Additive scores: s = u . tanh(q + k) of projected queries and keys (Bahdanau et al. 2015, appendix A.1.2), in place
// of the product of q and k.
//
// With e^(2x) = e^(2q) e^(2k), which is one multiplication where both powers are at hand,
//
//   r = 1 / (1 + e^(2x))      tanh x = 1 - 2 r      d tanh x / dx = 4 r (1 - r)
//
// so a term costs a reciprocal and a few multiply-adds instead of a tanh. The powers keep the relative accuracy of
// tanh's argument as it was rounded. Where |q| or |k| is above kAdditiveRange a power could overflow although the sum
// is small: those elements take tanh itself, element by element, so that a result does not depend on its neighbours.
#pragma once

#include "kernels/base2.inl.h"
#include "kernels/elementary.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/products.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

constexpr double kAdditiveRange = 40;

FOVEAL_INLINE bool is_additive(const HeadTask& h) { return h.additive != nullptr; }

// e^(2x) for |x| <= kAdditiveRange, squared so that its parts are in the range of exp2_scale.
template <class V>
FOVEAL_INLINE V exp_twice(V x) {
  using T = typename V::T;
  const V limit = broadcast<V>(static_cast<T>(kAdditiveRange));
  const V y = max(zero<V>() - limit, min(limit, x)) * broadcast<V>(static_cast<T>(kLog2E));
  const V n = round(y), f = y - n;
  const V root = exp2_scale(fma(exp2_quotient<V>(f), f, broadcast<V>(1)), n);
  return root * root;
}

template <class V>
FOVEAL_INLINE bool beyond_range(V x) {
  return lane_bits(greater(abs(x), broadcast<V>(static_cast<typename V::T>(kAdditiveRange)))) != 0;
}

// The powers of a block of keys, [n][dim]; whether any key is beyond the range.
template <class V>
static bool exp_keys(const typename V::T* k, int64_t stride, int64_t n, int64_t dim, typename V::T* to) {
  bool wide = false;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < dim; c += V::kLanes) {
      const V x = widen_n(k + j * stride + c, dim - c);
      wide |= beyond_range(x);
      narrow_n(to + j * dim + c, exp_twice(x), dim - c);
    }
  return wide;
}

// Rows in the lanes: q, its powers and u times log2 e, each [dim][rows].
template <class V>
struct AdditiveRows {
  typename V::T *q = nullptr, *powers = nullptr, *u = nullptr;
  bool wide = false;

  static int64_t elements(int64_t dim) { return 2 * dim * kTileRows<V>; }

  // From `transposed`, the rows as they are, which stays in use.
  void begin(const HeadTask& h, int64_t row_begin, int vectors, typename V::T* transposed, typename V::T* memory) {
    const int64_t width = int64_t{vectors} * V::kLanes;
    q = transposed;
    powers = memory;
    u = memory + h.head_dim * kTileRows<V>;
    wide = false;
    for (int64_t x = 0; x < h.head_dim * width; x += V::kLanes) {
      const V element = load(q + x);
      wide |= beyond_range(element);
      store(powers + x, exp_twice(element));
    }
    for (int64_t a = 0; a < h.head_dim; ++a)
      for (int64_t x = 0; x < width; ++x)
        u[a * width + x] = static_cast<typename V::T>(h.additive[(row_begin + x) % h.group * h.head_dim + a] * kLog2E);
  }
};

// Keys as a block has them, and their powers.
template <class T>
struct AdditiveKeys {
  const T* k;
  int64_t stride;
  const T* powers;  // [key][dim]
  bool wide;
};

// 1 / (1 + e^(2x)) of one feature, for a vector of rows at `at` and key j.
template <class V, bool kWide>
FOVEAL_INLINE V additive_share(const AdditiveRows<V>& rows, int64_t at, V power, V key) {
  using T = typename V::T;
  const V one = broadcast<V>(1);
  const V product = fma(load(rows.powers + at), power, one);
  const V share = reciprocal(min(broadcast<V>(static_cast<T>(0x1p60)), product));
  if constexpr (!kWide) return share;
  const V q = load(rows.q + at), half = broadcast<V>(static_cast<T>(0.5)),
          range = broadcast<V>(static_cast<T>(kAdditiveRange));
  const V direct = half - half * tanh(q + key);
  // A NaN fails every comparison, and is NaN either way.
  return select(greater(abs(q), range), direct, select(greater(abs(key), range), direct, share));
}

template <class V, int NK, int NV, bool kWide, class Finish>
FOVEAL_INLINE void additive_step(const HeadTask& h, const AdditiveRows<V>& rows,
                                 const AdditiveKeys<typename V::T>& keys, int64_t j, const Finish& finish) {
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  V acc[NK][NV];
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) acc[n][r] = zero<V>();
  for (int64_t a = 0; a < h.head_dim; ++a)
#pragma GCC unroll 8
    for (int n = 0; n < NK; ++n) {
      const V power = broadcast<V>(keys.powers[(j + n) * h.head_dim + a]);
      const V key = broadcast<V>(kWide ? keys.k[(j + n) * keys.stride + a] : 0);
#pragma GCC unroll 4
      for (int r = 0; r < NV; ++r) {
        const int64_t at = a * width + r * V::kLanes;
        // u (1 - 2 r), so that every term is as small as it is.
        const V share = additive_share<V, kWide>(rows, at, power, key);
        acc[n][r] = fma(load(rows.u + at), broadcast<V>(1) - (share + share), acc[n][r]);
      }
    }
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) finish(j + n, r, acc[n][r]);
}

// finish(j, r, score in base 2) for n keys and each vector r of rows.
template <class V, int NV, class Finish>
static void additive_scores(const HeadTask& h, const AdditiveRows<V>& rows, const AdditiveKeys<typename V::T>& keys,
                            int64_t n, const Finish& finish) {
  constexpr int kKeys = 2;
  int64_t j = 0;
  if (rows.wide || keys.wide) {
    for (; j < n; ++j) additive_step<V, 1, NV, true>(h, rows, keys, j, finish);
    return;
  }
  for (; j + kKeys <= n; j += kKeys) additive_step<V, kKeys, NV, false>(h, rows, keys, j, finish);
  for (; j < n; ++j) additive_step<V, 1, NV, false>(h, rows, keys, j, finish);
}

// From the gradients of scores ds[n][rows]: what the tile adds to those of q, dq [dim][rows], of k, dk
// [key][dk_stride], and of u, du [dim][rows], whose rows are summed later. Bit i of seen[j], where there is one: row i
// sees key j.
template <class V, int NV, bool kWide>
static void add_additive_gradients(const HeadTask& h, const AdditiveRows<V>& rows,
                                   const AdditiveKeys<typename V::T>& keys, int64_t n, const typename V::T* ds,
                                   const uint64_t* seen, typename V::T* dq, typename V::T* dk, int64_t dk_stride,
                                   typename V::T* du) {
  using T = typename V::T;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  const V one = broadcast<V>(1), factor = broadcast<V>(static_cast<T>(4 * kLn2));  // u is in base 2
  for (int64_t a = 0; a < h.head_dim; ++a) {
    V of_q[NV], of_u[NV];
    for (int r = 0; r < NV; ++r) {
      of_q[r] = load(dq + a * width + r * V::kLanes);
      of_u[r] = load(du + a * width + r * V::kLanes);
    }
    for (int64_t j = 0; j < n; ++j) {
      const V power = broadcast<V>(keys.powers[j * h.head_dim + a]);
      const V key = broadcast<V>(kWide ? keys.k[j * keys.stride + a] : 0);
      V of_k = zero<V>();
      for (int r = 0; r < NV; ++r) {
        const int64_t at = a * width + r * V::kLanes;
        const V d = load(ds + j * width + r * V::kLanes), share = additive_share<V, kWide>(rows, at, power, key);
        V inner = d * (load(rows.u + at) * factor * (share * (one - share)));
        V outer = d * (one - (share + share));
        if (seen != nullptr) {
          const auto visible = mask_from_bits<V>(seen[j] >> (r * V::kLanes));
          inner = select(visible, inner, zero<V>());
          outer = select(visible, outer, zero<V>());
        }
        of_q[r] = of_q[r] + inner;
        of_u[r] = of_u[r] + outer;
        of_k = of_k + inner;
      }
      dk[j * dk_stride + a] += reduce_add(of_k);
    }
    for (int r = 0; r < NV; ++r) {
      store(dq + a * width + r * V::kLanes, of_q[r]);
      store(du + a * width + r * V::kLanes, of_u[r]);
    }
  }
}

}  // namespace
}  // namespace foveal
