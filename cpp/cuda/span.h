// Which keys a query row sees by position: lengths, causal, window. Every kernel asks here, so all agree.
//
// Row i sits at position offset + i and sees the keys of [first_key(i), end_key(i)); both bounds grow with i, so the
// range of a block of rows runs from the first row's first key to the last row's end, and a block of keys needs no mask
// when it starts at or after the last row's first key and ends at or before the first row's end. Seen from a key, the
// rows are [first_row(j), end_row(j)), which grow with j in the same way.
#pragma once

#include "cuda/segment.h"

namespace foveal::cuda {

struct Span {
  int batch;              // of the optional operands
  int q_begin, q_extent;  // where the sequence's rows begin in q, out, lse, and how many there are
  int kv_begin, kv_extent;
  int q_len, kv_len;  // those that count: at most the extents
  int offset;
  int left;
  int right;

  FOVEAL_DEVICE Span(const Params& p, int segment) : left(p.window_left), right(p.window_right) {
    batch = segment;
    q_begin = kv_begin = 0;
    q_extent = p.seqlen_q;
    kv_extent = p.seqlen_kv;
    if (p.cu_seqlens_q.data) {
      const int last = p.batch > 0 ? p.batch - 1 : 0;
      batch = segment == 0 ? 0 : segment > last ? last : segment - 1;
      q_begin = segment_begin(p, p.cu_seqlens_q, p.seqlen_q, segment);
      q_extent = segment_begin(p, p.cu_seqlens_q, p.seqlen_q, segment + 1) - q_begin;
      kv_begin = segment_begin(p, p.cu_seqlens_kv, p.seqlen_kv, segment);
      kv_extent = segment_begin(p, p.cu_seqlens_kv, p.seqlen_kv, segment + 1) - kv_begin;
      if (segment == 0 || segment > p.batch) {  // tokens of no sequence
        q_len = kv_len = offset = 0;
        return;
      }
    }
    q_len = p.q_lens.data ? read_clamped(p.q_lens, offset_of(p.q_lens, batch), 0, q_extent) : q_extent;
    kv_len = p.kv_lens.data ? read_clamped(p.kv_lens, offset_of(p.kv_lens, batch), 0, kv_extent) : kv_extent;
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
