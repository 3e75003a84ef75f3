// Joins partial results of the same rows over different keys (a split key range), in a fixed order.
//
// Part p holds the unnormalised sums O_p and the row's state over its keys. The normaliser joins the states and says
// what each part's sums are worth then:  out = scale * sum_p worth_p O_p.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/normalizer.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Row r of part p is at partial[x * value_dim] with x = p * rows + r, and member m of its state at
// row_state[m * member_stride + x].
template <class V, class S>
static void merge(const RowTask& task, int64_t parts) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  const int64_t rows = task.row_end - task.row_begin;
  const T* partial = static_cast<const T*>(task.partial);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = task.row_begin + r;
    T* state = static_cast<T*>(task.row_state) + r;
    RowState<V, 1> joined;
    V factor;
    with_normalizer(h, [&]<class N>(N) {
      joined = N::template join<V>(h, row, state, task.member_stride, rows, parts);
      factor = N::scale(joined, 0);
    });
    const T* worth = state + kRowMax * task.member_stride;
    S* out = static_cast<S*>(h.out) + row / h.group * h.out_stride_s + row % h.group * h.out_stride_g;
    for (int64_t c = 0; c < h.value_dim; c += V::kLanes) {
      const int64_t n = min64(V::kLanes, h.value_dim - c);
      V acc = zero<V>();
      for (int64_t p = 0; p < parts; ++p)
        acc = fma(widen_n(partial + (p * rows + r) * h.value_dim + c, n), broadcast<V>(worth[p * rows]), acc);
      narrow_strided(out + c * h.out_stride_d, h.out_stride_d, acc * factor, n);
    }
    // Row r's slots of part 0 are read no more once the row is done, so the joined state can take their place.
    for (int m = 0; m < kRowMembers; ++m) narrow_n(state + m * task.member_stride, joined.of[m][0], 1);
  }
}

}  // namespace
}  // namespace foveal
