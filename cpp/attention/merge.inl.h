// Joins partial results of the same rows over different keys (a split key range), in a fixed order.
//
// Part p holds the unnormalised sums O_p and the state (max_p, sum_p) of its keys; in base 2, with m the largest max
// (the sink's too),
//   sum = sum_p 2^(max_p - m) sum_p  +  2^(sink - m)        out = sum_p 2^(max_p - m) O_p / sum
#pragma once

namespace foveal {
namespace {

// Joins the parts of a split key range, in their order. Part p, row r is at partial[(p * rows + r) * value_dim], its
// state at row_max[p * rows + r] and row_sum[p * rows + r].
template <class V, class S>
static void merge(const RowTask& task, int64_t parts) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  const int64_t rows = task.row_end - task.row_begin;
  T* row_max = static_cast<T*>(task.row_max);
  T* row_sum = static_cast<T*>(task.row_sum);
  const T* partial = static_cast<const T*>(task.partial);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = task.row_begin + r;
    T highest, total;
    begin_row(h, row, true, &highest, &total);
    const T sink = highest;
    for (int64_t p = 0; p < parts; ++p) {
      const T x = row_max[p * rows + r];
      if (x > highest || x != x) highest = x;
    }
    const V shift = or_zero_if_unseen(broadcast<V>(highest));
    alignas(64) T lanes[V::kLanes];
    const auto weight = [&](T max) {
      store(lanes, exp2_nonpositive(broadcast<V>(max) - shift));
      return lanes[0];
    };
    total *= weight(sink);
    for (int64_t p = 0; p < parts; ++p) {
      row_max[p * rows + r] = weight(row_max[p * rows + r]);
      total += row_sum[p * rows + r] * row_max[p * rows + r];
    }
    const V factor = inverse_or_zero(broadcast<V>(total));
    S* out = static_cast<S*>(h.out) + row / h.group * h.out_stride_s + row % h.group * h.out_stride_g;
    for (int64_t c = 0; c < h.value_dim; c += V::kLanes) {
      const int64_t n = min64(V::kLanes, h.value_dim - c);
      V acc = zero<V>();
      for (int64_t p = 0; p < parts; ++p)
        acc = fma(widen_n(partial + (p * rows + r) * h.value_dim + c, n), broadcast<V>(row_max[p * rows + r]), acc);
      narrow_strided(out + c * h.out_stride_d, h.out_stride_d, acc * factor, n);
    }
    // Row 0's slot of part 0 is read no more once its row is done, so the joined state can take its place.
    row_max[r] = highest;
    row_sum[r] = total;
  }
}

}  // namespace
}  // namespace foveal
