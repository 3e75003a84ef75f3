// Exact blocked scaled dot-product attention: the problem (WHAT), where it runs (WHERE), and the entry points.
//
//   out = softmax(policy(scale * q k^T)) v        Vaswani et al. 2017, eq. 1
//
// computed block by block with the online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021; Dao et al. 2022), so
// that no (seqlen_q, seqlen_kv) array exists unless the caller asks for `weights`.
//
// Symbols: B batch, Hq query heads, Hkv key/value heads (Hkv divides Hq; query head h reads kv head h / (Hq/Hkv)),
// Sq, Skv sequence lengths, D query/key head dim, Dv value head dim.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "foveal/tensor_view.h"

namespace foveal {

// Axis order of 4-D arrays. 3-D drops the batch axis; 2-D drops the head axis too.
enum class Layout : uint8_t { kBhsd, kBshd };

enum class ErrorKind : uint8_t { kNone, kType, kValue, kNotImplemented, kMemory, kInterrupted, kForked };

struct Status {
  ErrorKind kind = ErrorKind::kNone;
  std::string text;

  bool ok() const { return kind == ErrorKind::kNone; }
};

constexpr int64_t kUnlimited = -1;  // a window side without a limit

// As the caller gave it: rank 2..4 in `layout`. `canonicalize` turns it into the form that the kernels read.
struct AttentionProblem {
  TensorView q, k, v;       // (B,Hq,Sq,D), (B,Hkv,Skv,D), (B,Hkv,Skv,Dv)
  TensorView out;           // (B,Hq,Sq,Dv), q's dtype
  TensorView lse;           // optional (B,Hq,Sq), accumulator dtype, natural log
  TensorView weights;       // optional (B,Hq,Sq,Skv), q's dtype
  TensorView mask;          // optional bool, broadcastable to (B,Hq,Sq,Skv); true = attend
  TensorView bias;          // optional floating, broadcastable to (B,Hq,Sq,Skv)
  TensorView alibi_slopes;  // optional floating, (Hq,) or (B,Hq)
  TensorView sinks;         // optional floating, (Hq,)
  TensorView q_lens;        // optional int32/int64, (B,)
  TensorView kv_lens;       // optional int32/int64, (B,)
  TensorView q_offset;      // optional int32/int64, () or (B,); absent: kv_len - q_len (bottom-right)
  // Packed sequences, both or none, int32/int64 (B+1,): q (Tq,Hq,D), k (Tk,Hkv,D), v (Tk,Hkv,Dv), out (Tq,Hq,Dv), lse
  // (Hq,Tq), layout kBshd. Element b has the rows cu_seqlens_q[b] to cu_seqlens_q[b+1], keys likewise. Masks and biases
  // count from the first row and key of each element: Sq and Skv are the longest lengths.
  TensorView cu_seqlens_q, cu_seqlens_kv;
  // Paged keys, int32/int64 (B, pages a sequence): k (pages,Hkv,page size,D), v likewise, and key j of element b is row
  // j % page size of page block_table[b][j / page size]. Needs kv_lens; entries past them are never read.
  TensorView block_table;
  TensorView k_scale, v_scale;  // floating (pages, Hkv), with int8 k and v of paged keys: what one step is worth
  Layout layout = Layout::kBhsd;
  bool causal = false;
  int64_t window_left = kUnlimited;
  int64_t window_right = kUnlimited;
  bool has_scale = false;  // false: 1/sqrt(D)
  double scale = 0.0;
  double softcap = 0.0;    // 0: none
  double dropout_p = 0.0;  // the chance of a weight to be 0; the others are multiplied by 1 / (1 - dropout_p)
  uint64_t seed = 0;       // of dropout: with the places of a pair (b, h, i, j), all that decides about it
  int64_t packed_rows = 0, packed_keys = 0;  // canonical, with cu_seqlens: Tq and Tk

  bool packed() const { return cu_seqlens_q.present(); }
  bool paged() const { return block_table.present(); }
};

// Checks every argument and rewrites the views into canonical form:
//   q, k, v, out, weights, mask, bias   rank 4 in (B,H,S,D) order; broadcast axes get stride 0
//   lse                                  rank 3;  alibi_slopes rank 2 (B,Hq);  sinks rank 1
//   q_lens, kv_lens, q_offset            rank 1 (B,);  scale filled in;  layout kBhsd
//   packed: q, k, v, out, lse as (B,H,longest,.) with batch stride 0; element b begins at row cu_seqlens[b]
//   paged: k, v stay (pages,Hkv,page size,.)
// `out`, `lse`, `weights` are checked when present. The only place that judges arguments; the text follows
// "attention: k.shape[3] is 96, expected head_dim 128 (from q)".
Status canonicalize(AttentionProblem& problem);

// What the backward pass reads beside a problem whose `out` and `lse` are there, and what it fills. Like the problem as
// the caller has it, and canonical after `canonicalize`.
struct AttentionGradients {
  TensorView dout;        // like out
  TensorView dlse;        // optional, like lse
  TensorView dq, dk, dv;  // like q, k, v
  TensorView dbias;       // optional, accumulator dtype, broadcastable to (B,Hq,Sq,Skv): summed over axes of extent 1
  TensorView dsinks;      // optional (Hq,), accumulator dtype
};

// The same for a problem and its gradients.
Status canonicalize(AttentionProblem& problem, AttentionGradients& gradients);

// Tokens to append to the cache of keys and values that a problem reads, layout kBshd, before it is computed.
struct CacheUpdate {
  TensorView k, v;                    // optional, both: (B,Snew,Hkv,D), (B,Snew,Hkv,Dv), q's dtype
  TensorView rotary_cos, rotary_sin;  // optional, both, with k: floating (positions, pairs)
  bool rotary_interleaved = false;    // pairs are neighbours, else halves
  TensorView cache_batch_idx;         // optional int32/int64 (B,): the row of k and v that holds a sequence

  // Filled by `canonicalize` and `attention_kvcache`; the problem borrows from them.
  std::vector<int64_t> lens, table;
  std::vector<std::byte> queries;
};

// The same for a problem whose k and v are the cache, paged where it has a block_table, else one row a sequence, and
// whose kv_lens say what the cache holds before the update. Afterwards it is a paged problem with the lengths after it.
Status canonicalize(AttentionProblem& problem, CacheUpdate& update);

// The view of an array of the caller's rank and layout as (B,H,S,D); for outputs that a binding allocates after
// `canonicalize` accepted the inputs.
TensorView canonical_view(const TensorView& view, Layout layout);

struct KernelTable;  // one per instruction set, see isa/detect.h

struct ExecutionOptions {
  int num_threads = 1;
  const KernelTable* table = nullptr;    // null: the best that the machine has, or FOVEAL_ISA
  bool (*interrupted)(void*) = nullptr;  // polled on the calling thread between work items in calls over 50 ms
  void* interrupted_context = nullptr;
};

// Fills problem.out (and lse, weights when present). The problem is canonical. Bitwise the same for any num_threads and
// any batch composition. kMemory when scratch cannot be allocated, kInterrupted when `interrupted` returned true,
// kForked in a child that `interrupted` left behind: its outputs are undefined, and the call's other threads are not
// there.
Status attention_forward(const AttentionProblem& problem, const ExecutionOptions& options);

// Writes the new tokens into the cache, then attention_forward. Both are canonical.
Status attention_kvcache(AttentionProblem& problem, CacheUpdate& update, const ExecutionOptions& options);

// Fills gradients.dq, dk, dv (and dbias, dsinks when present) from dout and the out and lse of the forward pass. Memory
// beyond them is O(S * D). Bitwise the same for any num_threads.
Status attention_backward(const AttentionProblem& problem, const AttentionGradients& gradients,
                          const ExecutionOptions& options);

// The plain three-pass oracle, accumulating in float64, one row at a time: the meaning of every option in its clearest
// form.
Status attention_reference(const AttentionProblem& problem);

// The oracle of the gradients, from dout and the problem alone. The gradients are float64 whatever q's dtype is.
Status attention_backward_reference(const AttentionProblem& problem, const AttentionGradients& gradients);

}  // namespace foveal
