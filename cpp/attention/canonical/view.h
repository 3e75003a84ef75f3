// Arrays of the caller's rank and layout as (B,H,S,D), the order that all canonical ones have.
#pragma once

#include "foveal/attention.h"

namespace foveal {

enum Axis { kBatch, kHead, kSeq, kDim };

// Where the caller's array holds an axis of (B,H,S,D); negative when its rank drops that axis.
inline int position_of(int axis, int rank, Layout layout) {
  constexpr int kBhsdOrder[] = {0, 1, 2, 3};
  constexpr int kBshdOrder[] = {0, 2, 1, 3};
  const bool swapped = layout == Layout::kBshd && rank > 2;
  return (swapped ? kBshdOrder : kBhsdOrder)[axis] - (4 - rank);
}

inline TensorView canonical_view(const TensorView& view, Layout layout) {
  TensorView canonical = view;
  canonical.rank = 4;
  for (int axis = 0; axis < 4; ++axis) {
    const int position = position_of(axis, view.rank, layout);
    canonical.shape[axis] = position < 0 ? 1 : view.shape[position];
    canonical.stride[axis] = position < 0 ? 0 : view.stride[position];
  }
  return canonical;
}

// Of an lse, which has no D: (B,H,S).
inline TensorView canonical_lse(const TensorView& lse) {
  TensorView columns = lse;  // as (..., S, 1)
  columns.rank = lse.rank + 1;
  columns.shape[lse.rank] = 1;
  columns.stride[lse.rank] = 0;
  TensorView canonical = canonical_view(columns, Layout::kBhsd);
  canonical.rank = 3;
  return canonical;
}

}  // namespace foveal
