#include "attention/overlap.h"

#include <cstdlib>
#include <initializer_list>

namespace foveal {
namespace {

bool is_empty(const TensorView& view) {
  for (int axis = 0; axis < view.rank; ++axis) {
    if (view.shape[axis] == 0) return true;
  }
  return false;
}

int64_t stride_nbytes(const TensorView& view, int axis) { return std::abs(view.stride[axis]) * itemsize(view.dtype); }

struct Interval {
  int64_t begin, end;  // bytes
};

// The bytes that the array covers when the axes whose stride is a multiple of `period` stay at index 0; period 0 moves
// along all axes, so covers the whole array.
Interval covered(const TensorView& view, int64_t period) {
  const int64_t data = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data));
  Interval bytes{data, data + itemsize(view.dtype)};
  for (int axis = 0; axis < view.rank; ++axis) {
    const int64_t stride = view.stride[axis] * itemsize(view.dtype);
    if (period != 0 && stride % period == 0) continue;
    const int64_t reach = (view.shape[axis] - 1) * stride;
    (reach < 0 ? bytes.begin : bytes.end) += reach;
  }
  return bytes;
}

// Both arrays repeat with `period`, and within one period they stay on separate arcs.
bool apart_within(int64_t period, const TensorView& a, const TensorView& b) {
  const Interval bytes_a = covered(a, period);
  const Interval bytes_b = covered(b, period);
  const int64_t shift = bytes_b.begin - bytes_a.begin;
  const int64_t gap = (shift % period + period) % period;
  return gap >= bytes_a.end - bytes_a.begin && gap + (bytes_b.end - bytes_b.begin) <= period;
}

}  // namespace

bool may_overlap_itself(const TensorView& view) {
  if (is_empty(view)) return false;
  struct Axis {
    int64_t stride, extent;
  };
  Axis axes[kMaxRank];  // by rising stride
  int count = 0;
  for (int axis = 0; axis < view.rank; ++axis) {
    if (view.shape[axis] <= 1) continue;
    const int64_t stride = std::abs(view.stride[axis]);
    int place = count++;
    for (; place > 0 && axes[place - 1].stride > stride; --place) axes[place] = axes[place - 1];
    axes[place] = {stride, view.shape[axis]};
  }
  int64_t reach = 0;
  for (int axis = 0; axis < count; ++axis) {
    if (axes[axis].stride <= reach) return true;
    reach += (axes[axis].extent - 1) * axes[axis].stride;
  }
  return false;
}

bool may_overlap(const TensorView& a, const TensorView& b) {
  if (is_empty(a) || is_empty(b)) return false;
  const Interval bytes_a = covered(a, 0);
  const Interval bytes_b = covered(b, 0);
  if (bytes_a.end <= bytes_b.begin || bytes_b.end <= bytes_a.begin) return false;
  for (const TensorView* view : {&a, &b}) {
    for (int axis = 0; axis < view->rank; ++axis) {
      const int64_t period = stride_nbytes(*view, axis);
      if (period != 0 && apart_within(period, a, b)) return false;
    }
  }
  return true;
}

}  // namespace foveal
