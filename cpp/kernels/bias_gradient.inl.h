// The gradient of a bias that broadcasts: ds, summed over the axes along which the bias has one element for all.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// dbias += ds[n keys][NV vectors of rows]; an axis of stride 0 is summed.
template <class V, int NV>
static void add_to_bias(const GradientHead& g, int64_t row_begin, int64_t rows, int64_t key_begin, int64_t n,
                        const typename V::T* ds) {
  using T = typename V::T;
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  T* dbias = static_cast<T*>(g.dbias);
  if (g.dbias_stride_k == 1 && g.dbias_stride_s != 0) {
    for (int r = 0; r < NV; ++r) {
      T* pointers[V::kLanes];
      const int64_t done = int64_t{r} * V::kLanes;
      row_pointers<V>(g.head->group, row_begin + done, rows - done, dbias, g.dbias_stride_s, g.dbias_stride_g,
                      pointers);
      for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
        const int64_t keys = min64(V::kLanes, n - j0);
        V block[V::kLanes];
        for (int lane = 0; lane < V::kLanes; ++lane)
          block[lane] = lane < keys ? load(ds + (j0 + lane) * width + done) : zero<V>();
        transpose(block);
        for (int lane = 0; lane < V::kLanes && pointers[lane] != nullptr; ++lane) {
          T* to = pointers[lane] + key_begin + j0;
          narrow_n(to, widen_n(to, keys) + block[lane], keys);
        }
      }
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = row_begin / g.head->group, head = row_begin % g.head->group;
    for (int64_t r = 0; r < rows; ++r) {
      dbias[i * g.dbias_stride_s + head * g.dbias_stride_g + (key_begin + j) * g.dbias_stride_k] += ds[j * width + r];
      if (++head == g.head->group) {
        head = 0;
        ++i;
      }
    }
  }
}

}  // namespace
}  // namespace foveal
