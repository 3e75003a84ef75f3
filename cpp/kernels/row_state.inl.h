// What a row carries from one block of keys to the next, and what the backward pass reads of it.
#pragma once

#include "kernels/kernel_table.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// The state of NV vectors of rows.
template <class V, int NV>
struct RowState {
  V of[kRowMembers][NV];

  // Member m of the first row is at p[m * stride].
  FOVEAL_INLINE static RowState read(const typename V::T* p, int64_t stride) {
    RowState state;
#pragma GCC unroll 4
    for (int m = 0; m < kRowMembers; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < NV; ++r) state.of[m][r] = load(p + m * stride + r * V::kLanes);
    return state;
  }
  FOVEAL_INLINE void write(typename V::T* p, int64_t stride) const {
#pragma GCC unroll 4
    for (int m = 0; m < kRowMembers; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < NV; ++r) store(p + m * stride + r * V::kLanes, of[m][r]);
  }
};

// Of a vector of rows, for the gradient: what a normaliser subtracts from the scores, the threshold of the row below
// that, and the row's term.
template <class V>
struct RowTerms {
  V shift, threshold, delta;
};

}  // namespace
}  // namespace foveal
