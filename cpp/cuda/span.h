// Which keys a query row sees by position: lengths, causal, window. Every kernel asks here, so all agree.
//
// Row i sits at position offset + i and sees the keys of [first_key(i), end_key(i)); both bounds grow with i, so the
// range of a block of rows runs from the first row's first key to the last row's end, and a block of keys needs no mask
// when it starts at or after the last row's first key and ends at or before the first row's end. Seen from a key, the
// rows are [first_row(j), end_row(j)), which grow with j in the same way.
#pragma once

#include "cuda/operand.h"

namespace foveal::cuda {

struct Span {
  int q_len;
  int kv_len;
  int offset;
  int left;
  int right;

  FOVEAL_DEVICE Span(const Params& p, int batch) : left(p.window_left), right(p.window_right) {
    q_len = p.q_lens.data ? read_clamped(p.q_lens, offset_of(p.q_lens, batch), 0, p.seqlen_q) : p.seqlen_q;
    kv_len = p.kv_lens.data ? read_clamped(p.kv_lens, offset_of(p.kv_lens, batch), 0, p.seqlen_kv) : p.seqlen_kv;
    offset = p.q_offset.data ? read_clamped(p.q_offset, offset_of(p.q_offset, batch), -kPositionLimit, kPositionLimit)
                             : kv_len - q_len;
  }

  FOVEAL_DEVICE int first_key(int row) const {
    const int key = offset + row - left;
    return key < 0 ? 0 : key;
  }
  FOVEAL_DEVICE int end_key(int row) const {
    const int key = offset + row + right + 1;
    return key > kv_len ? kv_len : key;
  }
  FOVEAL_DEVICE int first_row(int key) const {
    const int row = key - offset - right;
    return row < 0 ? 0 : row;
  }
  FOVEAL_DEVICE int end_row(int key) const {
    const int last = key - offset + left;
    return last < q_len ? last + 1 : q_len;
  }
  FOVEAL_DEVICE bool sees(int row, int key) const { return row < q_len && key >= first_key(row) && key < end_key(row); }
};

}  // namespace foveal::cuda
