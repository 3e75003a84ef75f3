// The rows of the backward kernel: a tile of them as the five products read it.
//
//   qt, dot     [head_dim | value_dim][rows]   q * scale * log2(e), and dout, transposed, in steps of Dot
//   q, dout     [rows][head_dim | value_dim]   the same rows, in place where they are stored so, or pairs of rows
#pragma once

#include "kernels/additive.inl.h"
#include "kernels/arena.inl.h"
#include "kernels/bfloat16_products.inl.h"
#include "kernels/dot.inl.h"
#include "kernels/gradient_pairs.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/row_state.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

template <class V>
struct GradientTile {
  using T = typename V::T;
  int64_t row_begin, rows;
  int vectors;
  T *qt, *dot;
  Rows<T> q, dout;               // steps of rows, padded to whole vectors with anything finite, in place: by nothing
  T *shift, *threshold, *delta;  // RowTerms, a lane a row; +inf, 0 and 0 beyond the last
  T *entropy_slope, *entropy_shift;  // a lane a row; null: no gradient of the entropy
  T* dq;
  AdditiveRows<V> additive;
  T* du;           // [head_dim][rows], with additive scores
  T* row_sums;     // [kRowSums][rows]; null: not asked for
  bool untouched;  // dq is undefined and counts as 0
  bool finite;     // the terms, q and dout are

  FOVEAL_INLINE RowTerms<V> terms(int r) const {
    return {load(shift + r * V::kLanes), load(threshold + r * V::kLanes), load(delta + r * V::kLanes)};
  }
};

template <class V>
FOVEAL_INLINE int64_t padded(int64_t width) {
  return round_up(width, V::kLanes);
}

// Row-major rows for the products that have columns in the lanes: in place, or widened and padded with zeros, or pairs.
template <class V, class S, class Dot>
static Rows<typename V::T> gradient_rows(const HeadTask& h, const GradientTile<V>& tile, const void* base,
                                         int64_t stride_s, int64_t stride_g, int64_t stride_d, int64_t width,
                                         typename V::T* buffer) {
  using T = typename V::T;
  const S* src = static_cast<const S*>(base);
  if constexpr (__is_same(S, T))
    if (stride_d == 1 && h.group == 1 && width % V::kLanes == 0) return {src + tile.row_begin * stride_s, stride_s};
  const int64_t stride = padded<V>(width);
  for (int r = 0; r < tile.vectors; ++r) {
    const S* rows[V::kLanes];
    const int64_t done = int64_t{r} * V::kLanes;
    row_pointers<V>(h.group, tile.row_begin + done, tile.rows - done, src, stride_s, stride_g, rows);
    if constexpr (Dot::kStep == 2) {
      const auto chunk_at = [&](int64_t row, int64_t c) __attribute__((always_inline)) {
        return Dot::load_query(rows[row] + c * stride_d, stride_d, width - c, zero<V>());
      };
      pack_pairs<V>(min64(V::kLanes, tile.rows - done), stride, chunk_at, buffer + done / 2 * stride);
    } else {
      for (int lane = 0; lane < V::kLanes && rows[lane] != nullptr; ++lane)
        for (int64_t c = 0; c < width; c += V::kLanes)
          store(buffer + (done + lane) * stride + c,
                widen_strided<V>(rows[lane] + c * stride_d, stride_d, min64(V::kLanes, width - c)));
    }
  }
  return {buffer, stride};
}

template <class V, class S, class Dot>
static void begin_gradient_tile(const GradientTask& task, GradientTile<V>& tile, typename V::T* q_buffer,
                                typename V::T* dout_buffer) {
  using T = typename V::T;
  const GradientHead& g = *task.grads;
  const HeadTask& h = *g.head;
  const int64_t width = int64_t{tile.vectors} * V::kLanes;
  for (int r = 0; r < tile.vectors; ++r) {
    const int64_t done = int64_t{r} * V::kLanes, first = tile.row_begin + done, rows = tile.rows - done;
    const S* pointers[V::kLanes];
    row_pointers<V>(h.group, first, rows, static_cast<const S*>(h.q), h.q_stride_s, h.q_stride_g, pointers);
    load_transposed<V, S, Dot>(pointers, h.q_stride_d, h.head_dim, is_additive(h) ? broadcast<V>(1) : score_scale<V>(h),
                               tile.qt + done, width);
    row_pointers<V>(h.group, first, rows, static_cast<const S*>(g.dout), g.dout_stride_s, g.dout_stride_g, pointers);
    load_transposed<V, S, Dot>(pointers, g.dout_stride_d, h.value_dim, broadcast<V>(1), tile.dot + done, width);
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const bool inside = lane < rows;
      tile.shift[done + lane] = inside ? static_cast<const T*>(g.shift)[first + lane] : static_cast<T>(__builtin_inf());
      tile.threshold[done + lane] = inside ? static_cast<const T*>(g.threshold)[first + lane] : T{0};
      tile.delta[done + lane] = inside ? static_cast<const T*>(g.delta)[first + lane] : T{0};
      if (g.entropy_slope == nullptr) continue;
      tile.entropy_slope[done + lane] = inside ? static_cast<const T*>(g.entropy_slope)[first + lane] : T{0};
      tile.entropy_shift[done + lane] = inside ? static_cast<const T*>(g.entropy_shift)[first + lane] : T{0};
    }
  }
  tile.q = gradient_rows<V, S, Dot>(h, tile, h.q, h.q_stride_s, h.q_stride_g, h.q_stride_d, h.head_dim, q_buffer);
  tile.dout = gradient_rows<V, S, Dot>(h, tile, g.dout, g.dout_stride_s, g.dout_stride_g, g.dout_stride_d, h.value_dim,
                                       dout_buffer);
  const auto finite = [&](const T* transposed, int64_t dim) {
    const int64_t steps = (dim + Dot::kStep - 1) / Dot::kStep;
    return all_finite<V>(reinterpret_cast<const typename Dot::Key*>(transposed), 0, 1, steps * width * Dot::kStep);
  };
  tile.finite = all_finite<V>(tile.shift, 0, 1, tile.rows) && all_finite<V>(tile.threshold, 0, 1, tile.rows) &&
                all_finite<V>(tile.delta, 0, 1, tile.rows) && finite(tile.qt, h.head_dim) &&
                finite(tile.dot, h.value_dim);
}

}  // namespace
}  // namespace foveal
