// Which keys the rows of a tile see: lengths, causal, window and the dense mask as one bit a (key, row).
//
//   row r of the tile is query i = (row_begin + r) / group, at position q_offset + i
//   bits[j] holds, for key key_begin + j, bit r = "row r attends"
//
// Position rules (lengths, causal, window) give every key one contiguous run of rows, since positions grow with the
// row. The dense mask is read once a row in 64-key words, which also tell an all-false or an all-true block, and turned
// by a 64 x 64 bit transpose.
#pragma once

#include "kernels/kernel_table.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

FOVEAL_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FOVEAL_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FOVEAL_INLINE int64_t clamp64(int64_t x, int64_t low, int64_t high) { return max64(low, min64(x, high)); }

struct KeyRange {
  int64_t begin, end;
};

// The keys that query i sees by position and length alone.
FOVEAL_INLINE KeyRange visible_keys(const HeadTask& h, int64_t i) {
  const int64_t position = h.q_offset + i;
  return {clamp64(position - h.window_left, 0, h.kv_len), clamp64(position + h.window_right + 1, 0, h.kv_len)};
}

// The smallest range that holds every key seen by the rows [row_begin, row_end).
FOVEAL_INLINE KeyRange visible_keys(const HeadTask& h, int64_t row_begin, int64_t row_end) {
  const KeyRange first = visible_keys(h, row_begin / h.group);
  const KeyRange last = visible_keys(h, (row_end - 1) / h.group);
  return {first.begin, last.end};
}

FOVEAL_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Bit j = mask[j * stride] != 0, for n <= 64 keys.
FOVEAL_INLINE uint64_t mask_word(const uint8_t* p, int64_t stride, int64_t n) {
  if (stride == 1 && n == 64) return nonzero_bits64(p);
  uint64_t bits = 0;
  for (int64_t j = 0; j < n; ++j) bits |= static_cast<uint64_t>(p[j * stride] != 0) << j;
  return bits;
}

// a[r] bit j <-> a[j] bit r, by swapping ever smaller off-diagonal squares (Hacker's Delight, section 7-3).
static void transpose_bits64(uint64_t (&a)[64]) {
  uint64_t m = 0x00000000ffffffffu;
  for (int w = 32; w != 0; w >>= 1, m ^= m << w) {
    for (int i = 0; i < 64; i = ((i | w) + 1) & ~w) {
      const uint64_t t = ((a[i] >> w) ^ a[i | w]) & m;
      a[i] ^= t << w;
      a[i | w] ^= t;
    }
  }
}

enum class Visibility { kNone, kPartial, kFull };

// Fills bits[0, n) for the keys [key_begin, key_begin + n) when the answer is kPartial.
static Visibility visible_bits(const HeadTask& h, int64_t row_begin, int64_t rows, int64_t key_begin, int64_t n,
                               uint64_t* bits) {
  const KeyRange first = visible_keys(h, row_begin / h.group);
  const KeyRange last = visible_keys(h, (row_begin + rows - 1) / h.group);
  const bool by_position = last.begin > key_begin || first.end < key_begin + n;
  if (!by_position && h.mask == nullptr) return Visibility::kFull;

  const uint64_t all_rows = low_bits(rows);
  if (by_position) {
    const int64_t i_limit = (row_begin + rows) / h.group + 1;
    for (int64_t j = 0; j < n; ++j) {
      // Queries i with q_offset + i - left <= key <= q_offset + i + right.
      const int64_t key = key_begin + j;
      const int64_t i_begin = clamp64(key - h.window_right - h.q_offset, 0, i_limit);
      const int64_t i_end = clamp64(key + h.window_left - h.q_offset + 1, 0, i_limit);
      const int64_t r_begin = clamp64(i_begin * h.group - row_begin, 0, rows);
      const int64_t r_end = clamp64(i_end * h.group - row_begin, 0, rows);
      bits[j] = r_end > r_begin ? low_bits(r_end) & ~low_bits(r_begin) : 0;
    }
  } else {
    for (int64_t j = 0; j < n; ++j) bits[j] = all_rows;
  }

  if (h.mask != nullptr) {
    uint64_t any = 0, missing = 0;
    for (int64_t j0 = 0; j0 < n; j0 += 64) {
      const int64_t width = min64(64, n - j0);
      uint64_t words[64];
      for (int64_t r = 0; r < 64; ++r) {
        if (r >= rows) {
          words[r] = 0;
          continue;
        }
        const int64_t row = row_begin + r, i = row / h.group, g = row % h.group;
        const uint8_t* p = h.mask + i * h.mask_stride_s + g * h.mask_stride_g + (key_begin + j0) * h.mask_stride_k;
        words[r] = mask_word(p, h.mask_stride_k, width);
        missing |= words[r] ^ low_bits(width);
      }
      transpose_bits64(words);
      for (int64_t j = 0; j < width; ++j) any |= bits[j0 + j] &= words[j];
    }
    if (any == 0) return Visibility::kNone;
    if (!by_position && missing == 0) return Visibility::kFull;
  }
  return Visibility::kPartial;
}

}  // namespace
}  // namespace foveal
