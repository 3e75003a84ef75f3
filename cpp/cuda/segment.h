// Segments, and which rows of which one a block of the grid takes.
//
// A segment is a batch element; with packed sequences it is the stretch of tokens of one, and the tokens before the
// first and behind the last are a segment each, whose rows see nothing:
//
//   segment     0               1                     ...   B                     B + 1
//   tokens      [0, cu[0])      [cu[0], cu[1])        ...   [cu[B-1], cu[B])      [cu[B], T)
//
// How long they are only the device knows. So blocks of n rows lie in slots that need no count of the ones before: the
// blocks of a segment begin at slot begin / n + segment. Those numbers rise, and leave room for length / n, rounded up,
// blocks each; T / n + B + 2 slots hold them all, and a few slots stay empty.
#pragma once

#include "cuda/operand.h"

namespace foveal::cuda {

FOVEAL_DEVICE int num_segments(const Params& p) { return p.cu_seqlens_q.data ? p.batch + 2 : p.batch; }

// Boundaries that fall or leave the array are cut to it: values live on the device and cannot raise.
FOVEAL_DEVICE int segment_begin(const Params& p, const Array& cu_seqlens, int total, int segment) {
  if (segment <= 0) return 0;
  if (segment > p.batch + 1) return total;
  return read_clamped(cu_seqlens, offset_of(cu_seqlens, segment - 1), 0, total);
}

struct Block {
  int segment;
  int head;
  int first;  // row or key of its segment; at or past the extent in an empty slot
};

// Block `index` of a grid over `num_heads` heads of rows (or keys), `kRows` a block.
template <int kRows, bool kKeys>
FOVEAL_DEVICE Block locate_block(const Params& p, int num_heads, bool last_first) {
  const int total = kKeys ? p.seqlen_kv : p.seqlen_q;
  if (p.cu_seqlens_q.data == nullptr) {
    const int num_blocks = (total + kRows - 1) / kRows;
    const int block = block_index_x() % num_blocks;
    return {block_index_x() / num_blocks / num_heads, block_index_x() / num_blocks % num_heads,
            (last_first ? num_blocks - 1 - block : block) * kRows};
  }
  const Array& cu_seqlens = kKeys ? p.cu_seqlens_kv : p.cu_seqlens_q;
  const int num_slots = total / kRows + p.batch + 2;
  const int slot = block_index_x() % num_slots;
  int low = 0, high = p.batch + 1;  // the last segment that begins at or before the slot
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (segment_begin(p, cu_seqlens, total, middle) / kRows + middle <= slot) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int first_slot = segment_begin(p, cu_seqlens, total, low) / kRows + low;
  return {low, block_index_x() / num_slots, (slot - first_slot) * kRows};
}

}  // namespace foveal::cuda
