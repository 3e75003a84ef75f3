// Judges the arguments of a call and rewrites them into the one form that kernels read.
//
// The only place where shapes, dtypes, strides and values are refused, so that NumPy, torch and C++ callers meet the
// same errors. Texts count axes as the caller did: in a 3-D "bshd" call the head axis is 1. No text is built unless it
// is needed: a call on tiny arrays has no time for strings.
//
// Bounds that hold afterwards, so that kernels may add positions and multiply extents in int64_t:
//   elements of q, k, v, out and of the scores < 2^60 (so every extent too); |q_offset| <= 2^59; window sides < 2^62
#pragma once

#include <cstdint>
#include <initializer_list>

#include "attention/canonical/view.h"
#include "foveal/attention.h"

namespace foveal {

constexpr int64_t kMaxElements = int64_t{1} << 60;  // of up to 8 bytes each

// What the caller calls them.
struct Names {
  const char *k = "k", *v = "v", *kv_lens = "kv_lens";
};

// Arguments are rewritten in the order in which they are checked; the scores (B,Hq,Sq,Skv) are what the optional arrays
// must fit. Checks throw Rejection.
class Canonicalizer {
 public:
  static CanonicalProblem judged(const AttentionProblem& given, Status& status);
  static CanonicalGradients judged(const AttentionProblem& given, const AttentionGradients& gradients, Status& status);
  static CanonicalUpdate judged(const AttentionProblem& given, const CacheUpdate& update, Status& status);

 private:
  Canonicalizer(CanonicalProblem& problem, const Names& names)
      : p_(problem), names_(names), layout_(problem.layout), rank_(problem.rank) {}

  void judge();

  // arguments.cc: what is asked of arrays one by one, and which of them go together
  void check_dtypes() const;
  void check_memory() const;
  void check_memory(const char* name, const TensorView& view) const;
  void check_combination() const;
  void require_own_memory(const char* output, const TensorView& written) const;
  static void require_no_overlap(const char* output, const TensorView& written);

  // canonicalize.cc: shapes
  void rewrite_qkv();
  void check_sizes() const;
  void rewrite_outputs();
  void rewrite_statistics();
  void rewrite_lse(const char* name, TensorView& lse) const;
  void pack(std::initializer_list<TensorView*> rows, std::initializer_list<TensorView*> keys);
  void require_rank(const char* name, const TensorView& view, int rank) const;
  void require_extent(const char* name, const TensorView& view, Axis axis, const char* what, int64_t expected,
                      const char* source) const;

  // scores.cc: what scores and weights go through
  void broadcast_to_scores(const char* name, TensorView& view) const;
  void broadcast_to_rows(const char* name, TensorView& view) const;
  void broadcast_to_heads(const char* name, TensorView& view) const;
  void rewrite_alibi_slopes();
  void rewrite_additive(const char* name, TensorView& view) const;
  void rewrite_gate();
  void rewrite_span();
  void check_normalizer() const;
  void check_sinks() const;
  void rewrite_numbers();

  // sequences.cc: integers, whose values are judged too
  int64_t check_cu_seqlens(const char* name, const TensorView& begins, int64_t total, const char* source);
  void check_lens(const char* name, const TensorView& lens, int64_t seqlen, const char* source) const;
  void check_block_table() const;
  void rewrite_q_offset();

  // gradients.cc
  void judge_gradients(CanonicalGradients& gradients);
  void check_gradient(const char* name, const TensorView& view, DType dtype) const;
  void rewrite_gradient(const char* name, TensorView& view, const TensorView& like) const;

  CanonicalProblem& p_;
  const Names names_;
  const Layout layout_;     // the caller's
  const int rank_;          // the caller's, of q
  int64_t scores_[4] = {};  // of a batch element at most, packed or not
  int64_t rows_[3] = {};    // (B,Hq,Sq) of the caller's q; packed: (1,Hq,Tq)
};

}  // namespace foveal
