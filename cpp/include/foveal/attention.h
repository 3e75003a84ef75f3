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

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "foveal/normalizer.h"
#include "foveal/tensor_view.h"

namespace foveal {

// Axis order of 4-D arrays. 3-D drops the batch axis; 2-D drops the head axis too.
enum class Layout : uint8_t { kBhsd, kBshd };

enum class ErrorKind : uint8_t { kNone, kType, kValue, kNotImplemented, kMemory, kInterrupted, kForked };

// Why a call failed, in parts: whoever reports it puts them together, once, by `message`.
struct Status {
  ErrorKind kind = ErrorKind::kNone;
  std::string text;                    // "k.shape[3] is 96, expected head_dim 128 (from q)"
  const char* function = "attention";  // static; `of` replaces it; null: what failed is no call

  bool ok() const { return kind == ErrorKind::kNone; }
  std::string message() const { return ok() || function == nullptr ? text : std::string(function) + ": " + text; }

  // The same of another function, which the call of this one serves.
  Status of(const char* other) && {
    if (function != nullptr) function = other;
    return std::move(*this);
  }
};

// Of sums, and of the log-sum-exp.
constexpr DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

constexpr int64_t kUnlimited = -1;  // a window side without a limit

// As the caller gives it: rank 2..4 in `layout`.
struct AttentionProblem {
  TensorView q, k, v;  // (B,Hq,Sq,D), (B,Hkv,Skv,D), (B,Hkv,Skv,Dv)
  TensorView out;      // (B,Hq,Sq,Dv), q's dtype
  TensorView lse;      // optional (B,Hq,Sq), accumulator dtype, natural log
  TensorView weights;  // optional (B,Hq,Sq,Skv), q's dtype
  // Statistics of the weights before dropout, optional: like lse, argmax int64. With p = w / sum w: the entropy
  // -sum p log p in nats; sum w; the largest w, and the first key with the largest score (-1 where all weights are 0);
  // the normaliser's threshold, in the units of its formula (0 without one, inf where a row sees nothing).
  TensorView entropy, mass, max_weight, threshold, argmax;
  TensorView key_mass;  // optional (B,Hq,Skv), accumulator dtype: the sum of each key's weights over the queries
  // Optional, both: the heaviest keys of each query (B,Hq,Sq,n), int64, and their weights, of the accumulator dtype; -1
  // and 0 where fewer have a weight above 0.
  TensorView top_keys, top_weights;
  // Optional, floating (D,) or (Hq,D): u of additive scores, u . tanh(q + k) of projected queries and keys, in place of
  // scale * q.k; float32 and float64 only.
  TensorView additive;
  TensorView mask;          // optional bool, broadcastable to (B,Hq,Sq,Skv); true = attend
  TensorView bias;          // optional floating, broadcastable to (B,Hq,Sq,Skv)
  TensorView alibi_slopes;  // optional floating, (Hq,) or (B,Hq)
  TensorView sinks;         // optional floating, (Hq,)
  // Optional, both: adds log sigmoid((s - tau) / T) to a score s. Floating, tau broadcastable to (B,Hq,Sq) (packed: to
  // (Hq,Tq)), T > 0 of shape () or (Hq,).
  TensorView gate_tau, gate_temperature;
  TensorView span;     // optional floating, broadcastable to (B,Hq): adds log clamp((ramp + z - distance) / ramp, 0, 1)
  TensorView q_lens;   // optional int32/int64, (B,)
  TensorView kv_lens;  // optional int32/int64, (B,)
  TensorView q_offset;  // optional int32/int64, () or (B,); absent: kv_len - q_len (bottom-right)
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
  double span_ramp = 0.0;  // > 0, with a span
  Normalizer normalizer = Normalizer::kSoftmax;
  double dropout_p = 0.0;  // the chance of a weight to be 0; the others are multiplied by 1 / (1 - dropout_p)
  uint64_t seed = 0;       // of dropout: with the places of a pair (b, h, i, j), all that decides about it

  bool packed() const { return cu_seqlens_q.present(); }
  bool has_statistics() const { return entropy.present(); }
  // Whether something is made of all final weights, which takes the keys a second time.
  bool reads_weights() const { return weights.present() || key_mass.present() || top_keys.present(); }
  bool paged() const { return block_table.present(); }
};

// What the backward pass reads beside a problem whose `out` and `lse` are there, and what it fills.
struct AttentionGradients {
  TensorView dout;        // like out
  TensorView dlse;        // optional, like lse
  TensorView dentropy;    // optional, like lse; the problem's entropy and mass are those of the forward pass
  TensorView dq, dk, dv;  // like q, k, v
  TensorView dbias;       // optional, accumulator dtype, broadcastable to (B,Hq,Sq,Skv): summed over axes of extent 1
  TensorView dsinks;      // optional (Hq,), accumulator dtype
  // Optional, accumulator dtype, of the shapes that their inputs may have: summed over axes of extent 1.
  TensorView dgate_tau, dgate_temperature, dspan;
  TensorView dadditive;  // optional, accumulator dtype, of the shape of `additive`
};

// Tokens to append to the cache of keys and values that a problem reads, layout kBshd, before it is computed. The
// problem's k and v are the cache, paged where it has a block_table, else one row a sequence, and its kv_lens say what
// the cache holds before the update.
struct CacheUpdate {
  TensorView k, v;                    // optional, both: (B,Snew,Hkv,D), (B,Snew,Hkv,Dv), q's dtype
  TensorView rotary_cos, rotary_sin;  // optional, both, with k: floating (positions, pairs)
  bool rotary_interleaved = false;    // pairs are neighbours, else halves
  TensorView cache_batch_idx;         // optional int32/int64 (B,): the row of k and v that holds a sequence
};

// What a call can give, each the member of a problem of this name.
enum class Result : uint8_t {
  kOut,
  kLse,
  kWeights,
  kEntropy,
  kMass,
  kMaxWeight,
  kThreshold,
  kArgmax,
  kKeyMass,
  kTopKeys,
  kTopWeights
};

// A problem in the one form that planners and runners take. `canonicalize` alone makes one:
//
//   q, k, v, out, weights, mask, bias   rank 4 in (B,H,S,D) order; broadcast axes have stride 0
//   lse, gate_tau                       rank 3;  alibi_slopes, span rank 2 (B,Hq);  sinks, gate_temperature rank 1;
//   additive rank 2 (Hq,D) q_lens, kv_lens, q_offset           rank 1 (B,);  scale filled in packed: q, k, v, out, lse
//   as (B,H,longest,.) with batch stride 0; element b begins at row cu_seqlens[b] paged: k, v stay (pages,Hkv,page
//   size,.) a cache: paged, kv_lens after the update
//
// It borrows the caller's arrays, and owns what takes the place of one.
struct CanonicalProblem : AttentionProblem {
  int rank = 0;                              // of the caller's q; `layout` is the caller's too
  int64_t packed_rows = 0, packed_keys = 0;  // Tq and Tk

  // Of a cache: the lengths after the update, the page of each row, the queries after their rotation. Else null.
  std::unique_ptr<int64_t[]> own_kv_lens, own_block_table;
  std::unique_ptr<std::byte[]> own_q;

  // A result that the caller did not bring can be made once the arguments are accepted: `wanted` has its dtype, and its
  // shape in the caller's rank and layout; `take` makes a new array of that shape part of the problem.
  TensorView wanted(Result result, int64_t top_k = 0) const;
  void take(Result result, const TensorView& made);

 private:
  friend class Canonicalizer;
  friend struct CanonicalGradients;
  friend struct CanonicalUpdate;
  explicit CanonicalProblem(const AttentionProblem& given) : AttentionProblem(given), rank(given.q.rank) {}
};

// Gradients in the form of their problem.
struct CanonicalGradients : AttentionGradients {
  CanonicalProblem problem;

 private:
  friend class Canonicalizer;
  CanonicalGradients(const AttentionGradients& given, const AttentionProblem& of)
      : AttentionGradients(given), problem(of) {}
};

// The update of a problem's cache; k and v are (B,Hkv,Snew,.).
struct CanonicalUpdate : CacheUpdate {
  CanonicalProblem problem;
  TensorView queries;  // with rotary tables: what is to be turned and put into problem.q

 private:
  friend class Canonicalizer;
  CanonicalUpdate(const CacheUpdate& given, const AttentionProblem& of) : CacheUpdate(given), problem(of) {}
};

// Check every argument, and rewrite all of them. The only place that judges arguments; unless `status` is ok, what they
// return is of no use.
// `out`, `lse`, `weights` are checked when present.
CanonicalProblem canonicalize(const AttentionProblem& problem, Status& status);
CanonicalGradients canonicalize(const AttentionProblem& problem, const AttentionGradients& gradients, Status& status);
CanonicalUpdate canonicalize(const AttentionProblem& problem, const CacheUpdate& update, Status& status);

// What is canonical already is not to be judged by the rules for callers.
template <class... More>
void canonicalize(const CanonicalProblem&, More&&...) = delete;

struct KernelTable;  // one per instruction set, see isa/detect.h

struct ExecutionOptions {
  int num_threads = 1;
  const KernelTable* table = nullptr;    // null: the best that the machine has, or FOVEAL_ISA
  bool (*interrupted)(void*) = nullptr;  // polled on the calling thread between work items in calls over 50 ms
  void* interrupted_context = nullptr;
};

// Fills the results of the problem that are present; `out` may be absent where statistics are asked for. Bitwise the
// same for any num_threads and any batch composition. kMemory when scratch cannot be allocated, kInterrupted when
// `interrupted` returned true, kForked in a child that `interrupted` left behind: its outputs are undefined, and the
// call's other threads are not there.
Status attention_forward(const CanonicalProblem& problem, const ExecutionOptions& options);

// Writes the new tokens into the cache, then attention_forward.
Status attention_kvcache(const CanonicalUpdate& update, const ExecutionOptions& options);

// Fills gradients.dq, dk, dv (and dbias, dsinks when present) from dout and the out and lse of the forward pass. Memory
// beyond them is O(S * D). Bitwise the same for any num_threads.
Status attention_backward(const CanonicalGradients& gradients, const ExecutionOptions& options);

// The plain three-pass oracle, accumulating in float64, one row at a time: the meaning of every option in its clearest
// form.
Status attention_reference(const CanonicalProblem& problem);

// The oracle of the gradients, from dout and the problem alone. The gradients are float64 whatever q's dtype is.
Status attention_backward_reference(const CanonicalGradients& gradients);

}  // namespace foveal
