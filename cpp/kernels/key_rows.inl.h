// A block of keys or values as the products want it, wherever the head keeps them: one array, or pages of a cache.
//
// Pages (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention") are read
// in place, row by row, and a block may cross any number of them: blocks begin where they do in one array, so the bits
// are the same. Pages of codes (stored.h) are widened for the many-rows kernel, one block at a time: element = code *
// scale of the page, rounded to `To`. The few-rows kernel reads the codes themselves (C = To).
#pragma once

#include "kernels/arena.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/mask.inl.h"
#include "kernels/storage.inl.h"
#include "kernels/stored.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

struct KeyArray {
  const void* p;  // of key 0, or of page 0
  int64_t stride_page, stride_s, stride_d, width;
  const float* scales;  // of codes: one a page of the sequence
};

FOVEAL_INLINE KeyArray keys_of(const HeadTask& h) {
  return {h.k, h.k_stride_page, h.k_stride_s, h.k_stride_d, h.head_dim, h.k_scales};
}

FOVEAL_INLINE KeyArray values_of(const HeadTask& h) {
  return {h.v, h.v_stride_page, h.v_stride_s, h.v_stride_d, h.value_dim, h.v_scales};
}

// Walks the keys of a sequence in pages.
struct PageCursor {
  const HeadTask& h;
  int64_t page, row;

  FOVEAL_INLINE PageCursor(const HeadTask& head, int64_t key) : h(head), page(key / head.page_size) {
    row = key - page * h.page_size;
  }
  FOVEAL_INLINE int64_t offset(const KeyArray& a) const { return h.pages[page] * a.stride_page + row * a.stride_s; }
  FOVEAL_INLINE void next() {
    if (++row < h.page_size) return;
    row = 0;
    ++page;
  }
};

// Keys [begin, begin + n). Asks for those of the next block meanwhile: rows of some hundred bytes, far from each other,
// are nothing that hardware would guess.
template <class V, class To, class C>
static void widen_codes(const HeadTask& h, const KeyArray& a, int64_t begin, int64_t n, To* dst) {
  const C* codes = static_cast<const C*>(a.p);
  PageCursor now(h, begin), ahead(h, begin + kKeyBlock);
  const int64_t wanted = h.kv_len - kKeyBlock - begin;
  for (int64_t j = 0; j < n; ++j, now.next(), dst += a.width) {
    if (j < wanted) {
      for (int64_t x = 0; x < a.width; x += 64) __builtin_prefetch(codes + ahead.offset(a) + x, 0, 2);
      ahead.next();
    }
    const C* src = codes + now.offset(a);
    const V step = broadcast<V>(a.scales[now.page]);
    int64_t c = 0;
    if (a.stride_d == 1)
      for (; c + 2 * V::kLanes <= a.width; c += 2 * V::kLanes)
        narrow_two(dst + c, widen(src + c) * step, widen(src + c + V::kLanes) * step);
    for (; c < a.width; c += V::kLanes) {
      const int64_t some = min64(V::kLanes, a.width - c);
      narrow_n(dst + c, widen_strided<V>(src + c * a.stride_d, a.stride_d, some) * step, some);
    }
  }
}

// The rows of keys [begin, begin + n), stored as C. `packed` has room for n rows; `pointers`, for n, may be null: then
// the rows are evenly spaced.
template <class V, class To, class C>
static Rows<To> key_rows(const HeadTask& h, const KeyArray& a, int64_t begin, int64_t n, To* packed,
                         const To** pointers) {
  if constexpr (Stored<C>::kScaled && !__is_same(To, C)) {
    widen_codes<V, To, C>(h, a, begin, n, packed);
    return {packed, a.width};
  } else {
    const C* p = static_cast<const C*>(a.p);
    if (h.pages == nullptr) return rows_as<V, To>(p + begin * a.stride_s, a.stride_s, a.stride_d, n, a.width, packed);
    const bool in_place = __is_same(To, C) && a.stride_d == 1;
    int64_t page = begin / h.page_size, row = begin - page * h.page_size;
    for (int64_t j = 0; j < n; ++page, row = 0) {
      const int64_t run = min64(h.page_size - row, n - j);
      const int64_t offset = h.pages[page] * a.stride_page + row * a.stride_s;
      if (in_place && (run == n || pointers != nullptr)) {
        if constexpr (__is_same(To, C)) {
          if (run == n) return {p + offset, a.stride_s};
          for (int64_t x = 0; x < run; ++x) pointers[j + x] = p + offset + x * a.stride_s;
        }
      } else {
        pack_rows<V>(p + offset, a.stride_s, a.stride_d, run, a.width, packed + j * a.width);
      }
      j += run;
    }
    if (in_place && pointers != nullptr) return {nullptr, 0, pointers};
    return {packed, a.width};
  }
}

}  // namespace
}  // namespace foveal
