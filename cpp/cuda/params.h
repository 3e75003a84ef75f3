// What a kernel reads: a CanonicalProblem reduced to pointers, strides and 32-bit extents, passed by value.
//
// It has rank-4 (B,H,S,D) views with stride 0 on broadcast axes (see attention.h). Extents and positions fit 32 bits
// (plan.cc refuses larger ones); offsets in memory are 64-bit.
#pragma once

#include <cstdint>

#include "foveal/tensor_view.h"

namespace foveal::cuda {

// Positions stay within +-2^29 and a window side without a limit is 2^30, so no sum of three leaves 32 bits.
constexpr int kPositionLimit = 1 << 29;
constexpr int kNoLimit = 1 << 30;

constexpr int kMaxHeadDim = 256;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Array {
  void* data = nullptr;  // null: the optional argument was not given
  int64_t stride[4] = {};
  DType dtype = DType::kFloat32;
};

struct Params {
  Array q, k, v, out;               // (B,H,S,D)
  Array lse;                        // optional (B,Hq,Sq)
  Array weights;                    // optional (B,Hq,Sq,Skv), plain path only
  Array mask, bias;                 // optional (B,Hq,Sq,Skv)
  Array alibi_slopes;               // optional (B,Hq)
  Array sinks;                      // optional (Hq,)
  Array q_lens, kv_lens, q_offset;  // optional (B,)
  // Packed sequences, both or none, (B+1,): q, k, v, out, lse then have batch stride 0, and seqlen_q and seqlen_kv are
  // the numbers of all tokens.
  Array cu_seqlens_q, cu_seqlens_kv;
  // Paged keys, (B, pages a sequence): k and v are (num_pages,Hkv,page_size,.), and key j of element b is row
  // j % page_size of page block_table[b][j / page_size]; seqlen_kv is what the pages of a sequence hold.
  Array block_table;
  int num_pages = 0;
  int page_size = 0;
  int batch = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int group = 0;  // num_heads / num_kv_heads
  int seqlen_q = 0;
  int seqlen_kv = 0;
  int head_dim = 0;
  int value_dim = 0;
  int window_left = kNoLimit;
  int window_right = kNoLimit;  // 0 under causal
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  // Split keys: (num_splits, B, Hq, Sq, value_dim) normalised outputs and (num_splits, B, Hq, Sq) natural-log lse.
  float* partial_out = nullptr;
  float* partial_lse = nullptr;
  int num_splits = 1;
  // Backward. row_lse and row_delta are (B, Hq, row_pitch) of the accumulator, packed (Hq, row_pitch): backward_rows.h.
  Array dout, dlse;     // like out; optional, like lse
  Array dq, dk, dv;     // like q, k, v
  Array dbias, dsinks;  // optional, of the accumulator: (B,Hq,Sq,Skv) with stride 0 on summed axes, (Hq,)
  void* row_lse = nullptr;
  void* row_delta = nullptr;
  int row_pitch = 0;  // a multiple of kRowPitch
};

}  // namespace foveal::cuda
