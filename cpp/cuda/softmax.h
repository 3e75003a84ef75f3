// The online softmax (Milakov & Gimelshein 2018) of the rows that one thread shares with its quad.
//
// Scores may come unscaled: `scale_log2` turns a score into a power of two, weight = 2^(score * scale_log2 - max *
// scale_log2), one fused multiply-add and one exp2 per score. A row's maximum is kept equal across the quad; its sum is
// per thread until `finish`. A row that has seen no key has maximum -inf and sum 0.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace foveal::cuda {

FOVEAL_DEVICE float negative_infinity() { return -__builtin_huge_valf(); }

template <int kM>
struct OnlineSoftmax {
  float row_max[kM][2];
  float row_sum[kM][2];

  FOVEAL_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) row_max[m][half] = negative_infinity(), row_sum[m][half] = 0.0f;
  }

  // Turns scores into weights and rescales `out` where the maximum grew.
  template <int kN, int kD>
  FOVEAL_DEVICE void update(float (&score)[kM][kN][4], float (&out)[kM][kD][4], float scale_log2) {
    float factor[kM][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) top = maximum(top, maximum(score[m][n][2 * half], score[m][n][2 * half + 1]));
        top = maximum(top, shuffle_xor(top, 1));
        top = maximum(top, shuffle_xor(top, 2));
        // -inf - -inf would be NaN: a row without keys subtracts 0 and all its weights are 2^-inf = 0.
        const float shift = top == negative_infinity() ? 0.0f : top * scale_log2;
        factor[m][half] = exp2_approx(fused_multiply_add(row_max[m][half], scale_log2, -shift));
        grew |= top != row_max[m][half];
        row_max[m][half] = top;
        float sum = row_sum[m][half] * factor[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& s = score[m][n][2 * half + i];
            s = exp2_approx(fused_multiply_add(s, scale_log2, -shift));
            sum += s;
          }
        }
        row_sum[m][half] = sum;
      }
    }
    if (warp_any(grew)) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int d = 0; d < kD; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[m][d][i] *= factor[m][i / 2];
    }
  }

  // Adds the four partial sums of each row.
  FOVEAL_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum[m][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        row_sum[m][half] = sum;
      }
    }
  }
};

// The end of a row: what its output is multiplied by, and its lse (natural log) with the sink in the denominator.
struct RowEnd {
  float factor;
  float lse;
};

// `lse` without the sink (-inf: no key), `sink` -inf when there is none. The output so far is normalised to `lse`.
FOVEAL_DEVICE RowEnd include_sink(float lse, float sink) {
  if (sink == negative_infinity()) return {lse == negative_infinity() ? 0.0f : 1.0f, lse};
  const float top = maximum(lse, sink);
  const float own = exp2_approx((lse - top) * kLog2e);
  const float total = own + exp2_approx((sink - top) * kLog2e);
  return {divide(own, total), top + log2_approx(total) * kLn2};
}

}  // namespace foveal::cuda
