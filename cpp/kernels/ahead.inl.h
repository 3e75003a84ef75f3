// Asking for the keys or values that come next, as fast as those at hand are used up.
//
// Decoding waits for memory, and the hardware does not foresee the jump from a block's keys to its values, to the next
// block, or to the next page. While one phase works, it asks for what the next phase reads, in the order of memory,
// whatever the order in which heads and columns will be worked on, and evenly over the whole phase: a burst of requests
// fills the queue to memory, and the loads of the phase itself then wait behind it. Into the second-level cache: a
// block may be larger than the first.
#pragma once

#include "kernels/storage.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Short key ranges are likely in the cache already, and the requests would only cost.
constexpr int64_t kAheadFromBytes = 128 * 1024;

template <class C>
class Ahead {
 public:
  // Asks for nothing.
  FOVEAL_INLINE Ahead() = default;

  // `n` rows of `width` elements, while a phase uses up `used` of its own. Asking past the end of an array is harmless.
  FOVEAL_INLINE Ahead(const Rows<C>& rows, int64_t n, int64_t width, int64_t used)
      : rows_(rows), n_(n), nbytes_(width * static_cast<int64_t>(sizeof(C))) {
    pace_ = used > 0 ? (n * width + used - 1) / used : 0;
    if (n > 0) start_row(0);
  }

  // To be called after the use of as many elements.
  FOVEAL_INLINE void used(int64_t elements) {
    for (due_ += elements * static_cast<int64_t>(sizeof(C)) * pace_; due_ > 0; due_ -= kLine) {
      if (at_ >= end_) {
        if (row_ + 1 >= n_) return;
        start_row(row_ + 1);
      }
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  FOVEAL_INLINE void start_row(int64_t row) {
    row_ = row;
    at_ = reinterpret_cast<const char*>(rows_.row(row));
    end_ = at_ + nbytes_;
  }

  Rows<C> rows_ = {};
  int64_t n_ = 0, nbytes_ = 0, pace_ = 0;
  int64_t due_ = 0;  // bytes that the use so far has made due, less those asked for
  int64_t row_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace
}  // namespace foveal
