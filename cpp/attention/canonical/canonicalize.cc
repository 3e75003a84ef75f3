// The way of a call from its caller's form to the canonical one, and the shapes of its operands and results.
#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "attention/canonical/cache.h"
#include "attention/canonical/canonicalizer.h"
#include "attention/rejection.h"

namespace foveal {
namespace {

constexpr Names kCacheNames = {"k_cache", "v_cache", "cache_lens"};

template <class Check>
Status status_of(Check check) {
  try {
    check();
    return {};
  } catch (Rejection& rejection) {
    return std::move(rejection.status);
  } catch (const std::bad_alloc&) {
    return {ErrorKind::kMemory, "out of memory"};
  }
}

}  // namespace

CanonicalProblem Canonicalizer::judged(const AttentionProblem& given, Status& status) {
  CanonicalProblem canonical(given);
  status = status_of([&] {
    Canonicalizer x(canonical, {});
    x.judge();
    x.pack({&canonical.q, &canonical.out, &canonical.lse, &canonical.gate_tau, &canonical.entropy, &canonical.mass,
            &canonical.max_weight, &canonical.threshold, &canonical.argmax},
           {&canonical.k, &canonical.v});
  });
  return canonical;
}

CanonicalGradients Canonicalizer::judged(const AttentionProblem& given, const AttentionGradients& gradients,
                                         Status& status) {
  CanonicalGradients g(gradients, given);
  status = status_of([&] {
    Canonicalizer x(g.problem, {});
    x.judge();
    x.judge_gradients(g);
    x.pack({&g.problem.q, &g.problem.out, &g.problem.lse, &g.problem.gate_tau, &g.problem.entropy, &g.problem.mass,
            &g.dout, &g.dlse, &g.dentropy, &g.dq, &g.dgate_tau},
           {&g.problem.k, &g.problem.v, &g.dk, &g.dv});
  });
  return g;
}

CanonicalUpdate Canonicalizer::judged(const AttentionProblem& given, const CacheUpdate& update, Status& status) {
  CanonicalUpdate u(update, given);
  status = status_of([&] {
    check_cache(u);
    Canonicalizer(u.problem, kCacheNames).judge();
    check_update(u);
  });
  return u;
}

void Canonicalizer::judge() {
  check_dtypes();
  check_memory();
  check_combination();
  rewrite_qkv();
  if (p_.packed()) {
    scores_[2] = check_cu_seqlens("cu_seqlens_q", p_.cu_seqlens_q, p_.q.shape[kSeq], "q");
    scores_[3] = check_cu_seqlens("cu_seqlens_kv", p_.cu_seqlens_kv, p_.k.shape[kSeq], names_.k);
  }
  check_sizes();
  broadcast_to_scores("mask", p_.mask);
  broadcast_to_scores("bias", p_.bias);
  rewrite_alibi_slopes();
  if (p_.additive.present()) rewrite_additive("u", p_.additive);
  rewrite_gate();
  rewrite_span();
  check_normalizer();
  check_sinks();
  check_lens("q_lens", p_.q_lens, scores_[2], "q");
  check_lens(names_.kv_lens, p_.kv_lens, scores_[3], names_.k);
  if (p_.paged()) check_block_table();
  rewrite_q_offset();
  rewrite_numbers();
  rewrite_outputs();
}

void Canonicalizer::rewrite_qkv() {
  if (rank_ < 2 || rank_ > 4) reject_value("q has " + dimensions(rank_) + ", expected 2, 3 or 4");
  require_rank(names_.k, p_.k, rank_);
  require_rank(names_.v, p_.v, rank_);
  for (TensorView* view : {&p_.q, &p_.k, &p_.v}) *view = canonical_view(*view, layout_);

  const int64_t head_dim = p_.q.shape[kDim], value_dim = p_.v.shape[kDim];
  const int64_t num_heads = p_.q.shape[kHead], num_kv_heads = p_.k.shape[kHead];
  if (head_dim < 1) reject_value(extent_found("q", rank_ - 1, head_dim) + ", expected a head_dim of at least 1");
  if (value_dim < 1)
    reject_value(extent_found(names_.v, rank_ - 1, value_dim) + ", expected a value head_dim of at least 1");
  require_extent(names_.k, p_.k, kDim, "head_dim", head_dim, "q");
  if (p_.paged()) {
    require_extent(names_.v, p_.v, kBatch, "num_pages", p_.k.shape[kBatch], names_.k);
    if (p_.k.shape[kBatch] > INT32_MAX) reject_value(std::string(names_.k) + " has more than 2^31 - 1 pages");
  } else {
    require_extent(names_.k, p_.k, kBatch, "batch", p_.q.shape[kBatch], "q");
    require_extent(names_.v, p_.v, kBatch, "batch", p_.q.shape[kBatch], "q");
  }
  require_extent(names_.v, p_.v, kHead, "num_kv_heads", num_kv_heads, names_.k);
  require_extent(names_.v, p_.v, kSeq, "seqlen_kv", p_.k.shape[kSeq], names_.k);
  if (num_kv_heads == 0 ? num_heads != 0 : num_heads % num_kv_heads != 0) {
    reject_value(extent_found(names_.k, position_of(kHead, rank_, layout_), num_kv_heads) +
                 ", expected a divisor of num_heads " + std::to_string(num_heads) + " (from q)");
  }
  scores_[0] = p_.q.shape[kBatch];
  scores_[1] = num_heads;
  scores_[2] = p_.q.shape[kSeq];
  scores_[3] = p_.k.shape[kSeq];
  std::copy_n(p_.q.shape, 3, rows_);
  if (!p_.paged()) return;
  const TensorView& table = p_.block_table;
  if (table.rank != 2 || table.shape[0] != scores_[0]) {
    reject_shape("block_table", table, "(B, pages a sequence), B = " + std::to_string(scores_[0]));
  }
  if (__builtin_mul_overflow(table.shape[1], p_.k.shape[kSeq], &scores_[3])) scores_[3] = kMaxElements;
}

// Empty axes count as 1, so that an extent is bounded whatever stands beside it.
void Canonicalizer::check_sizes() const {
  const auto require_countable = [](const char* what, const int64_t (&shape)[4]) {
    int64_t elements = 1;
    for (const int64_t extent : shape) {
      const bool overflows = __builtin_mul_overflow(elements, std::max<int64_t>(extent, 1), &elements);
      if (overflows || elements >= kMaxElements) {
        reject_value(std::string(what) + " has shape " + text_of(shape, 4) + ", expected fewer than 2^60 elements");
      }
    }
  };
  const int64_t num_heads = scores_[1];
  require_countable("q", {rows_[0], num_heads, rows_[2], p_.q.shape[kDim]});
  require_countable(names_.k, {p_.k.shape[kBatch], p_.k.shape[kHead], p_.k.shape[kSeq], p_.k.shape[kDim]});
  require_countable(names_.v, {p_.v.shape[kBatch], p_.v.shape[kHead], p_.v.shape[kSeq], p_.v.shape[kDim]});
  require_countable("the output", {rows_[0], num_heads, rows_[2], p_.v.shape[kDim]});
  require_countable("the array of scores", scores_);
}

void Canonicalizer::rewrite_outputs() {
  if (p_.out.present()) {
    require_rank("out", p_.out, rank_);
    p_.out = canonical_view(p_.out, layout_);
    require_extent("out", p_.out, kBatch, "batch", rows_[0], "q");
    require_extent("out", p_.out, kHead, "num_heads", scores_[1], "q");
    require_extent("out", p_.out, kSeq, "seqlen_q", rows_[2], "q");
    require_extent("out", p_.out, kDim, "value head_dim", p_.v.shape[kDim], names_.v);
  }
  // lse and weights keep the order (B, Hq, Sq, ...) in every layout, and drop the axes that q drops.
  if (p_.lse.present()) rewrite_lse("lse", p_.lse);
  if (p_.weights.present()) {
    require_rank("weights", p_.weights, rank_);
    p_.weights = canonical_view(p_.weights, Layout::kBhsd);
    if (!std::equal(scores_, scores_ + 4, p_.weights.shape)) {
      reject_shape("weights", p_.weights, "(B, Hq, Sq, Skv) = " + text_of(scores_, 4));
    }
  }
  rewrite_statistics();
  require_own_memory("out", p_.out);
  require_own_memory("lse", p_.lse);
  require_own_memory("weights", p_.weights);
}

void Canonicalizer::rewrite_statistics() {
  using P = AttentionProblem;
  const DType accumulator = accumulator_of(p_.q.dtype);
  for (const auto& [name, member] :
       {std::pair("entropy", &P::entropy), std::pair("mass", &P::mass), std::pair("max_weight", &P::max_weight),
        std::pair("threshold", &P::threshold), std::pair("argmax", &P::argmax)}) {
    TensorView& view = p_.*member;
    if (!view.present()) continue;
    const DType dtype = member == &P::argmax ? DType::kInt64 : accumulator;
    if (view.dtype != dtype) reject_dtype(name, view.dtype, name_of(dtype));
    rewrite_lse(name, view);
    require_own_memory(name, view);
  }
  if (!p_.key_mass.present() && !p_.top_keys.present() && !p_.top_weights.present()) return;
  if (p_.packed() || p_.paged()) reject_value("key_mass or top_keys is asked for with cu_seqlens or block_table");
  if (p_.top_keys.present() != p_.top_weights.present())
    reject_value(std::string(p_.top_keys.present() ? "top_weights" : "top_keys") + " is absent, expected both");
  const auto require = [&](const char* name, const TensorView& view, DType dtype, int rank, const int64_t* shape) {
    if (!view.present()) return;
    if (view.dtype != dtype) reject_dtype(name, view.dtype, name_of(dtype));
    if (view.rank != rank || !std::equal(shape, shape + rank, view.shape))
      reject_shape(name, view, text_of(shape, rank));
    require_own_memory(name, view);
  };
  const int64_t keys[] = {scores_[0], scores_[1], scores_[3]};
  require("key_mass", p_.key_mass, accumulator, 3, keys);
  const int64_t top_k = p_.top_keys.rank == 4 ? p_.top_keys.shape[3] : 0;
  const int64_t top[] = {scores_[0], scores_[1], scores_[2], top_k};
  require("top_keys", p_.top_keys, DType::kInt64, 4, top);
  require("top_weights", p_.top_weights, accumulator, 4, top);
}

void Canonicalizer::rewrite_lse(const char* name, TensorView& lse) const {
  if (lse.rank != 3) {
    require_rank(name, lse, rank_ - 1);
    lse = canonical_lse(lse);
  }
  if (!std::equal(rows_, rows_ + 3, lse.shape)) reject_shape(name, lse, "(B, Hq, Sq) = " + text_of(rows_, 3));
}

// Packed arrays, (1,H,T,.) so far, as (B,H,longest,.): element b begins at a row of its own.
void Canonicalizer::pack(std::initializer_list<TensorView*> rows, std::initializer_list<TensorView*> keys) {
  if (!p_.packed()) return;
  p_.packed_rows = p_.q.shape[kSeq];
  p_.packed_keys = p_.k.shape[kSeq];
  const auto rewrite = [&](TensorView& view, int64_t longest) {
    view.shape[kBatch] = scores_[0];
    view.stride[kBatch] = 0;
    view.shape[kSeq] = longest;
  };
  for (TensorView* view : rows)
    if (view->present()) rewrite(*view, scores_[2]);
  for (TensorView* view : keys)
    if (view->present()) rewrite(*view, scores_[3]);
}

void Canonicalizer::require_rank(const char* name, const TensorView& view, int rank) const {
  if (view.rank != rank)
    reject_value(name + (" has " + dimensions(view.rank)) + ", expected " + std::to_string(rank) + " (from q)");
}

// `view` is canonical; the text names the axis of the caller's array.
void Canonicalizer::require_extent(const char* name, const TensorView& view, Axis axis, const char* what,
                                   int64_t expected, const char* source) const {
  if (view.shape[axis] == expected) return;
  reject_value(extent_found(name, position_of(axis, rank_, layout_), view.shape[axis]) + ", expected " + what + " " +
               std::to_string(expected) + " (from " + source + ")");
}

CanonicalProblem canonicalize(const AttentionProblem& problem, Status& status) {
  return Canonicalizer::judged(problem, status);
}

CanonicalGradients canonicalize(const AttentionProblem& problem, const AttentionGradients& gradients, Status& status) {
  return Canonicalizer::judged(problem, gradients, status);
}

CanonicalUpdate canonicalize(const AttentionProblem& problem, const CacheUpdate& update, Status& status) {
  return Canonicalizer::judged(problem, update, status);
}

namespace {

// The shape of a result in the order (B,Hq,Sq,last), how many of these axes it has, and its dtype.
struct ResultForm {
  int axes;
  int64_t last = 0;
  DType dtype;
};

ResultForm form_of(const CanonicalProblem& p, Result result, int64_t top_k) {
  const DType accumulator = accumulator_of(p.q.dtype);
  switch (result) {
    case Result::kOut:
      return {4, p.v.shape[kDim], p.q.dtype};
    case Result::kWeights:
      return {4, p.k.shape[kSeq], p.q.dtype};
    case Result::kArgmax:
      return {3, 0, DType::kInt64};
    case Result::kKeyMass:
      return {2, p.k.shape[kSeq], accumulator};
    case Result::kTopKeys:
      return {4, top_k, DType::kInt64};
    case Result::kTopWeights:
      return {4, top_k, accumulator};
    default:
      return {3, 0, accumulator};
  }
}

TensorView& member_of(CanonicalProblem& p, Result result) {
  switch (result) {
    case Result::kOut:
      return p.out;
    case Result::kLse:
      return p.lse;
    case Result::kWeights:
      return p.weights;
    case Result::kEntropy:
      return p.entropy;
    case Result::kMass:
      return p.mass;
    case Result::kMaxWeight:
      return p.max_weight;
    case Result::kThreshold:
      return p.threshold;
    case Result::kArgmax:
      return p.argmax;
    case Result::kKeyMass:
      return p.key_mass;
    case Result::kTopKeys:
      return p.top_keys;
    case Result::kTopWeights:
      break;
  }
  return p.top_weights;
}

// Without the axes that q lacks, an array of (B,Hq,Skv) keeps the last.
bool is_of_keys(Result result) { return result == Result::kKeyMass; }

}  // namespace

TensorView CanonicalProblem::wanted(Result result, int64_t top_k) const {
  const int64_t rows = packed() ? packed_rows : q.shape[kSeq];
  const ResultForm form = form_of(*this, result, top_k);
  const int64_t whole[] = {q.shape[kBatch], q.shape[kHead], rows, form.last};
  TensorView view;
  view.dtype = form.dtype;
  view.device = q.device;
  if (is_of_keys(result)) {
    view.rank = 0;
    for (int axis = 4 - rank; axis < 2; ++axis) view.shape[view.rank++] = whole[axis];
    view.shape[view.rank++] = form.last;
    return view;
  }
  view.rank = form.axes == 4 ? rank : rank - 1;
  for (int axis = 0; axis < 4; ++axis) {
    const int position = position_of(axis, rank, result == Result::kOut ? layout : Layout::kBhsd);
    if (position >= 0) view.shape[position] = whole[axis];
  }
  return view;
}

void CanonicalProblem::take(Result result, const TensorView& made) {
  TensorView& view = member_of(*this, result);
  if (is_of_keys(result)) {
    const int missing = 3 - made.rank;
    view = made;
    view.rank = 3;
    for (int axis = 2; axis >= 0; --axis) {
      view.shape[axis] = axis < missing ? 1 : made.shape[axis - missing];
      view.stride[axis] = axis < missing ? 0 : made.stride[axis - missing];
    }
    return;
  }
  const bool of_rows = form_of(*this, result, 0).axes == 3;
  view = result == Result::kOut ? canonical_view(made, layout)
         : of_rows              ? canonical_lse(made)
                                : canonical_view(made, Layout::kBhsd);
  if (!packed()) return;
  view.shape[kBatch] = q.shape[kBatch];
  view.shape[kSeq] = q.shape[kSeq];
}

}  // namespace foveal
