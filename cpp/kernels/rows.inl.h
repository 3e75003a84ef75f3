// The rows of a register tile between their strided home, one row after the other, and the transposed form in which the
// lanes of a vector are rows.
//
// A row is a (query, head-in-group) pair, numbered  row = i * group + g  (kernels/kernel_table.h).
#pragma once

#include "kernels/dot.inl.h"
#include "kernels/mask.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Pointers to `rows` rows from `first` on in an array with one axis for queries and one for the heads of the group;
// null beyond them. Counts along instead of dividing row by row.
template <class V, class P>
FOVEAL_INLINE void row_pointers(int64_t group, int64_t first, int64_t rows, P* base, int64_t stride_s, int64_t stride_g,
                                P* (&pointers)[V::kLanes]) {
  int64_t i = first / group, g = first - i * group;
  for (int lane = 0; lane < V::kLanes; ++lane) {
    pointers[lane] = lane < rows ? base + i * stride_s + g * stride_g : nullptr;
    if (++g == group) {
      g = 0;
      ++i;
    }
  }
}

// One vector of rows of `dim` elements, times `scale`, into column r of a [steps of Dot][width] array; zeros where a
// pointer is null.
template <class V, class S, class Dot>
FOVEAL_INLINE void load_transposed(const S* const (&rows)[V::kLanes], int64_t stride_d, int64_t dim, V scale,
                                   typename V::T* column, int64_t width) {
  const int64_t steps = (dim + Dot::kStep - 1) / Dot::kStep;
  for (int64_t step = 0; step < steps; step += V::kLanes) {
    const int64_t d = step * Dot::kStep;
    V block[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane)
      block[lane] =
          rows[lane] == nullptr ? zero<V>() : Dot::load_query(rows[lane] + d * stride_d, stride_d, dim - d, scale);
    transpose(block);
    for (int64_t c = 0; c < min64(V::kLanes, steps - step); ++c) store(column + (step + c) * width, block[c]);
  }
}

// Columns [c, c + n) of one vector of rows, times `factor`, to a row-major array.
template <class V, class P>
FOVEAL_INLINE void write_columns(const typename V::T* ot, int64_t width, int64_t n, V factor,
                                 P* const (&rows)[V::kLanes], int64_t c, int64_t stride_d) {
  V block[V::kLanes];
  for (int lane = 0; lane < V::kLanes; ++lane) block[lane] = lane < n ? load(ot + lane * width) * factor : zero<V>();
  transpose(block);
  for (int lane = 0; lane < V::kLanes && rows[lane] != nullptr; ++lane)
    narrow_strided(rows[lane] + c * stride_d, stride_d, block[lane], n);
}

// The reverse of load_transposed: one vector of rows out of column r of a [dim][width] array.
template <class V, class P>
static void write_transposed(const typename V::T* ot, int64_t width, int64_t dim, V factor, P* const (&rows)[V::kLanes],
                             int64_t stride_d) {
  int64_t c = 0;
  if (stride_d == 1)  // the usual case, with everything that it fixes known to the compiler
    for (; c + V::kLanes <= dim; c += V::kLanes) write_columns(ot + c * width, width, V::kLanes, factor, rows, c, 1);
  for (; c < dim; c += V::kLanes)
    write_columns(ot + c * width, width, min64(V::kLanes, dim - c), factor, rows, c, stride_d);
}

}  // namespace
}  // namespace foveal
