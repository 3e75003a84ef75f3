// Which row and which key a lane of a block's scores belongs to. A kernel holds the scores of n keys as vectors,
// kVectors of them a step, in one of two ways:
//
//   RowLanes   s[key][kVectors of rows]   many rows: a lane is a row, a step is one key
//   KeyLanes   s[key][R rows]             few rows: lane l is row l % R of key l / R, a step is kLanes / R keys
//
// What is done to scores (score_policy.inl.h) is written once over either.
#pragma once

#include "kernels/arena.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

template <class V, int NV>
struct RowLanes {
  static constexpr int kVectors = NV;
  static constexpr int kKeys = 1;  // a step
  static constexpr bool kFusesBias = true;
  int64_t row_begin, rows;

  static constexpr int64_t steps(int64_t n) { return n; }
  FOVEAL_INLINE int64_t row(int r, int lane) const { return row_begin + r * V::kLanes + lane; }
  FOVEAL_INLINE static constexpr int64_t key(int) { return 0; }
  // Bit l: whether lane l of vector r sees its key; bit i of bits[j] says it of row i and key j.
  FOVEAL_INLINE static uint64_t seen(const uint64_t* bits, int64_t step, int r) {
    return bits[step] >> (r * V::kLanes);
  }

  // visit(x, bias): the vector of the bias that belongs to s[x ...], for every vector of n keys from key_begin on.
  template <class Visit>
  FOVEAL_INLINE void for_each_bias(const HeadTask& h, int64_t key_begin, int64_t n, const Visit& visit) const {
    for (int r = 0; r < NV; ++r)
      for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
        const int64_t width = min64(V::kLanes, n - j0);
        V block[V::kLanes];
        for (int lane = 0; lane < V::kLanes; ++lane) {
          const int64_t i = row(r, lane);
          block[lane] = zero<V>();
          if (i >= row_begin + rows) continue;
          const int64_t offset =
              i / h.group * h.bias_stride_s + i % h.group * h.bias_stride_g + (key_begin + j0) * h.bias_stride_k;
          block[lane] = widen_any<V>(h.bias, h.bias_dtype, offset, h.bias_stride_k, width);
        }
        transpose(block);
        for (int64_t j = 0; j < width; ++j) visit(((j0 + j) * NV + r) * V::kLanes, block[j]);
      }
  }
};

template <class V, int R>
struct KeyLanes {
  static constexpr int kVectors = 1;
  static constexpr int kKeys = V::kLanes / R;
  static constexpr bool kFusesBias = false;  // two roundings, as in every release so far
  int64_t row_begin, rows;

  static constexpr int64_t steps(int64_t n) { return (n + kKeys - 1) / kKeys; }  // the last may reach past n keys
  FOVEAL_INLINE int64_t row(int, int lane) const { return row_begin + min64(lane % R, rows - 1); }
  FOVEAL_INLINE static constexpr int64_t key(int lane) { return lane / R; }
  FOVEAL_INLINE static uint64_t seen(const uint64_t* bits, int64_t step, int) {
    uint64_t lanes = 0;
    for (int key = 0; key < kKeys; ++key) lanes |= (bits[step * kKeys + key] & low_bits(R)) << (key * R);
    return lanes;
  }

  template <class Visit>
  FOVEAL_INLINE void for_each_bias(const HeadTask& h, int64_t key_begin, int64_t n, const Visit& visit) const {
    using T = typename V::T;
    alignas(64) T bias[kKeyBlock * R + V::kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = row_begin + r, offset = i / h.group * h.bias_stride_s + i % h.group * h.bias_stride_g;
      for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
        const int64_t width = min64(V::kLanes, n - j0);
        alignas(64) T lanes[V::kLanes];
        store(lanes,
              widen_any<V>(h.bias, h.bias_dtype, offset + (key_begin + j0) * h.bias_stride_k, h.bias_stride_k, width));
        for (int64_t j = 0; j < width; ++j) bias[(j0 + j) * R + r] = lanes[j];
      }
    }
    for (int64_t x = 0; x < steps(n) * V::kLanes; x += V::kLanes) visit(x, load(bias + x));
  }
};

}  // namespace
}  // namespace foveal
