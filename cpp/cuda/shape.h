// Shapes that host and device must agree on: rows and bytes of shared memory of each kernel family.
#pragma once

namespace foveal::cuda {

constexpr int tile_nbytes(int rows, int columns) { return rows * columns * 2; }

// forward_mma.h: Q, one K and one V tile
constexpr int forward_shared_nbytes(int head_dim, int block_m, int block_n) {
  return tile_nbytes(block_m, head_dim) + 2 * tile_nbytes(block_n, head_dim);
}

// decode.h: Q and a ring of K and V tiles per warp, whose place the merge takes
constexpr int kSplitKeys = 256;
constexpr int kPackedRows = 16;
constexpr int kWarpKeys = 16;
constexpr int kCombineRows = 4;
constexpr int decode_shared_nbytes(int head_dim, int warps, int stages) {
  const int ring = warps * stages * 2 * tile_nbytes(kWarpKeys, head_dim);
  const int merge = warps * kPackedRows * (head_dim + 2) * 4;
  return tile_nbytes(kPackedRows, head_dim) + (ring > merge ? ring : merge);
}

// forward_plain.h: Q rows and 32 padded keys or values
constexpr int kPlainKeys = 32;
constexpr int kPlainRowsPerWarp = 4;
constexpr int kPlainThreadsFloat = 256;
constexpr int kPlainThreadsDouble = 128;
constexpr int kPlainRowsFloat = kPlainThreadsFloat / 32 * kPlainRowsPerWarp;
constexpr int kPlainRowsDouble = kPlainThreadsDouble / 32 * kPlainRowsPerWarp;
constexpr int plain_shared_nbytes(int itemsize, int rows, int head_dim, int value_dim) {
  const int width = head_dim > value_dim ? head_dim : value_dim;
  return itemsize * (rows * head_dim + kPlainKeys * (width + 1));
}

// backward_mma.h: two owned tiles, and two stages of two walked tiles with lse and delta of their rows
constexpr int kRowPitch = 64;  // row_lse and row_delta are whole in every walked tile
constexpr int backward_owned_rows(int m_tiles, int warps, int column_parts) {
  return warps / column_parts * 16 * m_tiles;
}
constexpr int backward_shared_nbytes(int head_dim, int owned, int walked) {
  return 2 * tile_nbytes(owned, head_dim) + 2 * (2 * tile_nbytes(walked, head_dim) + 2 * walked * 4);
}

// backward_plain.h: two owned rows each, and 32 padded walked rows
constexpr int kPlainBackwardRowsPerWarpFloat = 4;
constexpr int kPlainBackwardRowsPerWarpDouble = 2;
constexpr int plain_backward_shared_nbytes(int itemsize, int rows, int head_dim, int value_dim) {
  const int width = head_dim > value_dim ? head_dim : value_dim;
  return itemsize * (rows * (head_dim + value_dim) + kPlainKeys * (width + 1));
}

// backward_rows.h and backward_bias.h
constexpr int kPrepareThreads = 256;
constexpr int kSinkThreads = 256;

}  // namespace foveal::cuda
