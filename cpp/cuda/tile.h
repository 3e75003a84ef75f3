// A tile of 16-bit elements in shared memory, swizzled so that every ldmatrix phase touches all 32 banks once.
//
//   row r, chunk c (16 bytes, 8 elements) lies at ((r * kChunks) + (c ^ (r & 7))) * 16 bytes
//
// An ldmatrix phase reads one chunk column of 8 consecutive rows; rows are multiples of 128 bytes long, so without the
// exclusive-or all 8 would start in the same bank. The permutation stays inside an aligned group of 8 chunks, hence the
// column count is a multiple of 64.
//
// Lane addresses. Stepping k by 16 elements moves the chunk by 2: (2k + c) ^ r = 2k' ^ (c ^ r) + 8*(k/4) with k' = k
// mod 4, so a lane keeps one address and each step costs one exclusive-or with a constant; rows + 8n and k/4 are
// immediates.
#pragma once

#include "cuda/device.h"

namespace foveal::cuda {

template <int kRows_, int kColumns_>
struct Tile {
  static_assert(kColumns_ % 64 == 0 && kRows_ % 16 == 0);
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kRowNbytes = kColumns * 2;
  static constexpr int kNbytes = kRows * kRowNbytes;

  static constexpr FOVEAL_DEVICE uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>((row * kChunks + (chunk ^ (row & 7))) * 16);
  }

  // `lane_address` is tile + offset(row, c) with c in {0, 1}; gives the address of (row, c + 2 * step).
  static constexpr FOVEAL_DEVICE uint32_t advance(uint32_t lane_address, int step) {
    return (lane_address ^ static_cast<uint32_t>((step & 3) * 32)) + static_cast<uint32_t>((step >> 2) * 128);
  }
};

// Where the lanes of a warp point for the three operand shapes, see device.h for the fragments they receive.
FOVEAL_DEVICE int lane_index() { return thread_index() & 31; }

// A operand, 16 rows x 16 columns: matrices (rows 0-7 | 8-15) x (chunk 0, then 1).
template <class Tile>
FOVEAL_DEVICE uint32_t lane_address_a(uint32_t tile) {
  const int lane = lane_index();
  return tile + Tile::offset(lane & 15, lane >> 4);
}
// B operand from (n, k) rows, 16 n x 16 k: b0, b1 of n 0-7, then of n 8-15.
template <class Tile>
FOVEAL_DEVICE uint32_t lane_address_b(uint32_t tile) {
  const int lane = lane_index();
  return tile + Tile::offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// B operand from (k, n) rows through the transposing load, 16 k x 16 n: b0, b1 of n 0-7, then of n 8-15.
template <class Tile>
FOVEAL_DEVICE uint32_t lane_address_b_trans(uint32_t tile) {
  return lane_address_a<Tile>(tile);
}

// Rows [first_row, first_row + kRows) of a row-major array whose rows start 16-byte aligned. Rows at or past
// `row_limit` and columns at or past `num_columns` (a multiple of 8) are not read and become zeros. Shared by kThreads
// threads, 0 <= thread < kThreads; the caller commits.
template <class Tile, int kThreads, class Element>
FOVEAL_DEVICE void load_tile(int thread, uint32_t tile, const Element* source, int64_t row_stride, int first_row,
                             int row_limit, int num_columns) {
  constexpr int kRowsPerPass = kThreads / Tile::kChunks;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowsPerPass == 0);
  const int chunk = thread % Tile::kChunks;
  const int row = thread / Tile::kChunks;
  int64_t step = row_stride * kRowsPerPass;
  forget_origin(step);
  const Element* lane_source = source + (first_row + row) * row_stride + chunk * 8;
  const int rows_left = chunk * 8 < num_columns ? row_limit - first_row - row : 0;
#pragma unroll
  for (int pass = 0; pass < Tile::kRows / kRowsPerPass; ++pass) {
    const int r = pass * kRowsPerPass;
    cp_async_16(tile + Tile::offset(row + r, chunk), lane_source, r < rows_left);
    lane_source += step;
  }
}

// The other way: rows [tile_row, tile_row + num_rows) of a tile to an array of the same form, which begins at tile row
// 0. Rows at or past `row_limit` and columns at or past `num_columns` are not written.
template <class Tile, int kThreads, class Element>
FOVEAL_DEVICE void store_rows(int thread, uint32_t tile, int tile_row, int num_rows, Element* target,
                              int64_t row_stride, int row_limit, int num_columns) {
#pragma unroll 4
  for (int i = thread; i < num_rows * Tile::kChunks; i += kThreads) {
    const int row = tile_row + i / Tile::kChunks;
    const int chunk = i % Tile::kChunks;
    if (row < row_limit && chunk * 8 < num_columns) {
      *reinterpret_cast<Chunk*>(target + row * row_stride + chunk * 8) =
          shared_load_128(tile + Tile::offset(row, chunk));
    }
  }
}

// Does either 16-bit element of `word` hold inf or NaN? An exponent of all ones carries into the cleared sign bit.
template <class Element>
FOVEAL_DEVICE bool has_nonfinite(uint32_t word);
template <>
FOVEAL_DEVICE bool has_nonfinite<Float16>(uint32_t word) {
  return (((word & 0x7c007c00u) + 0x04000400u) & 0x80008000u) != 0;
}
template <>
FOVEAL_DEVICE bool has_nonfinite<BFloat16>(uint32_t word) {
  return (((word & 0x7f807f80u) + 0x00800080u) & 0x80008000u) != 0;
}

// Whether the chunks that this thread itself loaded hold inf or NaN; its own copies are visible to it without a
// barrier.
template <class Element, class Tile, int kThreads>
FOVEAL_DEVICE bool own_chunks_nonfinite(int thread, uint32_t tile) {
  constexpr int kRowsPerPass = kThreads / Tile::kChunks;
  const int chunk = thread % Tile::kChunks;
  const int row = thread / Tile::kChunks;
  bool found = false;
#pragma unroll
  for (int pass = 0; pass < Tile::kRows / kRowsPerPass; ++pass) {
    const Chunk c = shared_load_128(tile + Tile::offset(row + pass * kRowsPerPass, chunk));
    for (int i = 0; i < 4; ++i) found |= has_nonfinite<Element>(c.word[i]);
  }
  return found;
}

}  // namespace foveal::cuda
