// What the plain kernels share: how many rows a block takes, and how rows of any dtype and strides enter shared memory.
#pragma once

#include "cuda/operand.h"

namespace foveal::cuda {

template <class Real_, int kWarps_, int kRowsPerWarp_>
struct PlainConfig {
  using Real = Real_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kRowsPerWarp = kRowsPerWarp_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kWarps * kRowsPerWarp;
};

// Rows [first, first + count) of `a` (batch and head already in `base`) into shared rows of `pitch` elements.
template <class Config>
FOVEAL_DEVICE void stage_rows(typename Config::Real* target, int pitch, const Array& a, int64_t base, int first,
                              int count, int columns) {
  for (int i = thread_index(); i < count * columns; i += Config::kThreads) {
    const int row = i / columns;
    const int column = i - row * columns;
    target[row * pitch + column] = read_real<typename Config::Real>(a, base + offset_of(a, 0, 0, first + row, column));
  }
}

// The same of the keys or values [first, first + count) of a kv head, wherever they lie.
template <class Config>
FOVEAL_DEVICE void stage_keys(typename Config::Real* target, int pitch, const Params& p, const Array& a, int batch,
                              int kv_head, int first, int count, int columns) {
  for (int i = thread_index(); i < count * columns; i += Config::kThreads) {
    const int row = i / columns;
    const int column = i - row * columns;
    target[row * pitch + column] =
        read_real<typename Config::Real>(a, key_offset(p, a, batch, kv_head, first + row) + column * a.stride[3]);
  }
}

}  // namespace foveal::cuda
