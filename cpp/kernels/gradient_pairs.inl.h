// The sums of the backward kernel by the instruction that multiplies pairs of bfloat16: two rows, or two keys, a
// multiply-add.
//
// dV and dK sum over rows, dQ over keys. With PairDot (dot.inl.h) the weights and the gradients of the scores are
// rounded to bfloat16, as PyTorch and FlashAttention round them; products are exact, sums float32. What that costs in
// accuracy: docs/numerics.md. A pair is two neighbours in the index that is summed over, side by side in a lane:
//
//   q, dout, k   [pair of rows | keys][column]    packed once a tile, or once a block of keys for all tiles
//   p, ds        [key][pair of rows]              in place of the unrounded ones
//   ds           [pair of keys][row]
//
// The last of an odd number is paired with zeros.
#pragma once

#include "kernels/dot.inl.h"
#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// chunk_at(row, column): 32 elements of a row from a column on, zeros beyond its end. `stride` is the width in whole
// vectors.
template <class V, class Chunk>
static Rows<typename V::T> pack_pairs(int64_t rows, int64_t stride, const Chunk& chunk_at, typename V::T* buffer) {
  typename V::T* to = buffer;
  for (int64_t row = 0; row < rows; row += 2, to += stride)
    for (int64_t c = 0; c < stride; c += 2 * V::kLanes) {
      V lower, upper, left, right;
      interleave_pairs(chunk_at(row, c), row + 1 < rows ? chunk_at(row + 1, c) : zero<V>(), lower, upper);
      separate_columns(lower, upper, left, right);
      store(to + c, left);
      if (c + V::kLanes < stride) store(to + c + V::kLanes, right);
    }
  return {buffer, stride};
}

// And back: the elements, one row after the other.
template <class V>
static Rows<typename V::T> unpack_pairs(const Rows<typename V::T>& pairs, int64_t rows, typename V::T* buffer) {
  for (int64_t row = 0; row < rows; row += 2)
    for (int64_t c = 0; c < pairs.stride; c += V::kLanes) {
      V first, second;
      widen_pairs(load(pairs.row(row / 2) + c), first, second);
      store(buffer + row * pairs.stride + c, first);
      if (row + 1 < rows) store(buffer + (row + 1) * pairs.stride + c, second);
    }
  return {buffer, pairs.stride};
}

// x[n][NV vectors of rows] as pairs of rows, in its own memory.
template <class V, int NV>
static void round_row_pairs(typename V::T* x, int64_t n) {
  const int64_t size = n * NV * V::kLanes;
  BFloat16* to = reinterpret_cast<BFloat16*>(x);
  int64_t at = 0;
  for (; at + 2 * V::kLanes <= size; at += 2 * V::kLanes) store_pairs(to + at, load(x + at), load(x + at + V::kLanes));
  if (at < size) store_pairs(to + at, load(x + at), zero<V>());  // the room is twice what is needed
}

// x[n][NV vectors of rows] as pairs of keys.
template <class V, int NV>
static void round_key_pairs(const typename V::T* x, int64_t n, typename V::T* pairs) {
  constexpr int64_t width = int64_t{NV} * V::kLanes;
  for (int64_t j = 0; j < n; j += 2, x += 2 * width, pairs += width)
#pragma GCC unroll 4
    for (int64_t r = 0; r < width; r += V::kLanes)
      store(pairs + r, round_pairs(load(x + r), j + 1 < n ? load(x + width + r) : zero<V>()));
}

}  // namespace
}  // namespace foveal
