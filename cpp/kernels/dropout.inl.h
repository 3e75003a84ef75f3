// Dropout of weights (Srivastava et al. 2014): a pair's weight becomes 0 or is multiplied by 1 / (1 - p), as its own
// random word (philox.h) decides.
#pragma once

#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/philox.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

FOVEAL_INLINE bool drops(const HeadTask& h) { return h.dropout_threshold != 0; }

// visit(x, factor) for the pairs of n keys and the NV vectors of rows from row_begin on, stored as [key][rows]: x is
// where a vector of them lies, and factor what its weights are multiplied by.
template <class V, int NV, class Visit>
static void for_each_dropout(const HeadTask& h, int64_t row_begin, int64_t key_begin, int64_t n, const Visit& visit) {
  using T = typename V::T;
  constexpr int kRows = NV * V::kLanes;
  uint32_t row[kRows], head[kRows];
  int64_t i = row_begin / h.group, g = row_begin % h.group;
  for (int lane = 0; lane < kRows; ++lane) {
    row[lane] = static_cast<uint32_t>(i);
    head[lane] = h.q_head + static_cast<uint32_t>(g);
    if (++g == h.group) {
      g = 0;
      ++i;
    }
  }
  const auto threshold = static_cast<uint32_t>(h.dropout_threshold);
  const T scale = static_cast<T>(h.dropout_scale);
  for (int64_t four = key_begin / 4 * 4; four < key_begin + n; four += 4) {
    alignas(64) T factor[4][kRows];
    for (int lane = 0; lane < kRows; ++lane) {  // which the compiler turns into vector code
      const PhiloxWords words = dropout_words(h.seed, h.batch, head[lane], row[lane], four);
      factor[0][lane] = words.word[0] >= threshold ? scale : T{0};
      factor[1][lane] = words.word[1] >= threshold ? scale : T{0};
      factor[2][lane] = words.word[2] >= threshold ? scale : T{0};
      factor[3][lane] = words.word[3] >= threshold ? scale : T{0};
    }
    for (int64_t key = max64(four, key_begin); key < min64(four + 4, key_begin + n); ++key)
      for (int r = 0; r < NV; ++r)
        visit(((key - key_begin) * NV + r) * V::kLanes, load(factor[key - four] + r * V::kLanes));
  }
}

template <class V, int NV>
static void apply_dropout(const HeadTask& h, int64_t row_begin, int64_t key_begin, int64_t n, typename V::T* weights) {
  for_each_dropout<V, NV>(h, row_begin, key_begin, n,
                          [weights](int64_t x, V factor) { store(weights + x, load(weights + x) * factor); });
}

}  // namespace
}  // namespace foveal
