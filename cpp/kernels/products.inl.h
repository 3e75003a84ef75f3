// The matrix products of a register tile, which is where the time goes. All keep sums in registers and read the operand
// that is not in the lanes by scalar broadcast, in place.
//
//   key_products    s[key][row]  = key . row                         rows in the lanes
//   add_values      o[col][row] += value[key][col] * p[key][row]     rows in the lanes
//   add_rows        y[key][col] += p[key][row] * x[row][col]         columns in the lanes
//
// A multiply-add takes what Dot takes in a step (dot.inl.h): one element of the index that is summed over, or two,
// which then lie side by side in one lane.
//
// The guarded forms are for the rare block where a masked pair meets an inf or NaN: masked products are dropped instead
// of added as 0 * x.
#pragma once

#include "kernels/dot.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

constexpr int kRowVectors = 3;
constexpr int kTileStep = kVectorRegisters >= 32 ? 8 : 4;  // keys (or value columns) a register tile holds at once

template <class V>
constexpr int64_t kTileRows = int64_t{kRowVectors} * V::kLanes;

// ---- rows in the lanes ----------------------------------------------------------------------------------------------

template <class V, class Dot, int NK, int NV, class Finish>
FOVEAL_INLINE void key_products_step(const typename V::T* qt, int64_t dim, const typename Dot::Key* k, int64_t k_stride,
                                     int64_t j, const Finish& finish) {
  V acc[NK][NV];
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) acc[n][r] = zero<V>();
  const auto add = [&](int64_t step, const auto& key_at) __attribute__((always_inline)) {
    V q[NV];
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) q[r] = load(qt + (step * NV + r) * V::kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < NK; ++n) {
      const V kb = key_at(k + n * k_stride);
#pragma GCC unroll 4
      for (int r = 0; r < NV; ++r) acc[n][r] = Dot::multiply_add(kb, q[r], acc[n][r]);
    }
  };
  const int64_t steps = dim / Dot::kStep;
  for (int64_t step = 0; step < steps; ++step)
    add(step,
        [step](const auto* row) __attribute__((always_inline)) { return Dot::broadcast_key(row + step * Dot::kStep); });
  if (steps * Dot::kStep < dim)
    add(steps,
        [dim](const auto* row) __attribute__((always_inline)) { return Dot::broadcast_last_key(row + dim - 1); });
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) finish(j + n, r, acc[n][r]);
}

// finish(j, r, k[j] . row) for n keys and each vector r of rows; `qt` holds the rows as [step of Dot][rows].
template <class V, class Dot, int NV, class Finish>
FOVEAL_INLINE void key_products(const typename V::T* qt, int64_t dim, const typename Dot::Key* k, int64_t k_stride,
                                int64_t n, const Finish& finish) {
  int64_t j = 0;
  for (; j + kTileStep <= n; j += kTileStep)
    key_products_step<V, Dot, kTileStep, NV>(qt, dim, k + j * k_stride, k_stride, j, finish);
  for (; j < n; ++j) key_products_step<V, Dot, 1, NV>(qt, dim, k + j * k_stride, k_stride, j, finish);
}

template <class V, class Dot, int NC, int NV, bool kFirst>
FOVEAL_INLINE void value_step(const typename V::T* p, int64_t n, const typename V::T* v, int64_t v_stride,
                              typename V::T* ot, const V (&rescale)[NV]) {
  V acc[NC][NV];
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c)
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) acc[c][r] = kFirst ? zero<V>() : load(ot + (c * NV + r) * V::kLanes) * rescale[r];
  for (int64_t j = 0; j < n; ++j) {
    V w[NV];
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) w[r] = load(p + (j * NV + r) * V::kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const V vb = broadcast<V>(v[j * v_stride + c]);
#pragma GCC unroll 4
      for (int r = 0; r < NV; ++r) acc[c][r] = Dot::multiply_add(vb, w[r], acc[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < NC; ++c)
#pragma GCC unroll 4
    for (int r = 0; r < NV; ++r) store(ot + (c * NV + r) * V::kLanes, acc[c][r]);
}

// For n steps of keys. The sums so far, which count as 0 when kFirst, are multiplied by `rescale` on the way.
template <class V, class Dot, int NV, bool kFirst>
static void add_values(const typename V::T* p, int64_t n, const typename V::T* v, int64_t v_stride, int64_t value_dim,
                       typename V::T* ot, const V (&rescale)[NV]) {
  constexpr int64_t step = int64_t{NV} * V::kLanes;
  int64_t c = 0;
  for (; c + kTileStep <= value_dim; c += kTileStep)
    value_step<V, Dot, kTileStep, NV, kFirst>(p, n, v + c, v_stride, ot + c * step, rescale);
  for (; c < value_dim; ++c) value_step<V, Dot, 1, NV, kFirst>(p, n, v + c, v_stride, ot + c * step, rescale);
}

// `masked(j, r)`: the rows of vector r that must not see key j.
template <class V, int NV, class Masked>
static void add_values_guarded(const typename V::T* p, int64_t n, const typename V::T* v, int64_t v_stride,
                               int64_t value_dim, typename V::T* ot, const V (&rescale)[NV], bool first,
                               const Masked& masked) {
  constexpr int64_t step = int64_t{NV} * V::kLanes;
  for (int64_t c = 0; c < value_dim; ++c)
    for (int r = 0; r < NV; ++r) {
      typename V::T* o = ot + c * step + r * V::kLanes;
      V acc = first ? zero<V>() : load(o) * rescale[r];
      for (int64_t j = 0; j < n; ++j) {
        const V w = load(p + (j * NV + r) * V::kLanes);
        acc = select(masked(j, r), acc, fma(broadcast<V>(v[j * v_stride + c]), w, acc));
      }
      store(o, acc);
    }
}

// ---- columns in the lanes -------------------------------------------------------------------------------------------

template <class V, class Dot, int NK, int NC>
FOVEAL_INLINE void add_rows_step(const typename V::T* p, int64_t p_stride, const typename V::T* x, int64_t x_stride,
                                 int64_t rows, typename V::T* y, int64_t y_stride) {
  V acc[NK][NC];
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < NC; ++c) acc[n][c] = load(y + n * y_stride + c * V::kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    V column[NC];
#pragma GCC unroll 4
    for (int c = 0; c < NC; ++c) column[c] = load(x + r * x_stride + c * V::kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < NK; ++n) {
      const V pb = broadcast<V>(p[n * p_stride + r]);
#pragma GCC unroll 4
      for (int c = 0; c < NC; ++c) acc[n][c] = Dot::multiply_add(pb, column[c], acc[n][c]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < NC; ++c) store(y + n * y_stride + c * V::kLanes, acc[n][c]);
}

template <class V, class Dot, int NC>
static void add_rows_columns(const typename V::T* p, int64_t p_stride, int64_t n, const typename V::T* x,
                             int64_t x_stride, int64_t rows, typename V::T* y, int64_t y_stride) {
  int64_t j = 0;
  for (; j + 6 <= n; j += 6)
    add_rows_step<V, Dot, 6, NC>(p + j * p_stride, p_stride, x, x_stride, rows, y + j * y_stride, y_stride);
  for (; j + 2 <= n; j += 2)
    add_rows_step<V, Dot, 2, NC>(p + j * p_stride, p_stride, x, x_stride, rows, y + j * y_stride, y_stride);
  for (; j < n; ++j)
    add_rows_step<V, Dot, 1, NC>(p + j * p_stride, p_stride, x, x_stride, rows, y + j * y_stride, y_stride);
}

// For n keys and `rows` steps of rows; `width`, the columns of x and y, is a whole number of vectors.
template <class V, class Dot>
static void add_rows(const typename V::T* p, int64_t p_stride, int64_t n, const typename V::T* x, int64_t x_stride,
                     int64_t rows, int64_t width, typename V::T* y, int64_t y_stride) {
  constexpr int kWide = kVectorRegisters >= 32 ? 4 : 2;
  int64_t c = 0;
  for (; c + kWide * V::kLanes <= width; c += kWide * V::kLanes)
    add_rows_columns<V, Dot, kWide>(p, p_stride, n, x + c, x_stride, rows, y + c, y_stride);
  if constexpr (kWide > 2)
    for (; c + 2 * V::kLanes <= width; c += 2 * V::kLanes)
      add_rows_columns<V, Dot, 2>(p, p_stride, n, x + c, x_stride, rows, y + c, y_stride);
  for (; c < width; c += V::kLanes) add_rows_columns<V, Dot, 1>(p, p_stride, n, x + c, x_stride, rows, y + c, y_stride);
}

// Bit r of seen[j]: row r sees key j.
template <class V>
static void add_rows_guarded(const typename V::T* p, int64_t p_stride, int64_t n, const typename V::T* x,
                             int64_t x_stride, int64_t rows, int64_t width, typename V::T* y, int64_t y_stride,
                             const uint64_t* seen) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < width; c += V::kLanes) {
      V acc = load(y + j * y_stride + c);
      for (int64_t r = 0; r < rows; ++r)
        if (seen[j] >> r & 1) acc = fma(broadcast<V>(p[j * p_stride + r]), load(x + r * x_stride + c), acc);
      store(y + j * y_stride + c, acc);
    }
}

}  // namespace
}  // namespace foveal
