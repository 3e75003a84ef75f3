// Judges the arguments of attention and rewrites them into the one form that kernels read.
//
// The only place where shapes, dtypes, strides and values are refused, so that NumPy, torch and C++ callers meet the
// same errors. Texts count axes as the caller did: in a 3-D "bshd" call the head axis is 1. No text is built unless it
// is needed: a call on tiny arrays has no time for strings.
//
// Bounds that hold afterwards, so that kernels may add positions and multiply extents in int64_t:
//   elements of q, k, v, out and of the scores < 2^60 (so every extent too); |q_offset| <= 2^59; window sides < 2^62
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <initializer_list>
#include <new>
#include <numbers>
#include <utility>

#include "attention/cache_arguments.h"
#include "attention/canonical_view.h"
#include "attention/element.h"
#include "attention/overlap.h"
#include "attention/rejection.h"
#include "foveal/attention.h"

namespace foveal {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 60;  // of up to 8 bytes each
constexpr int64_t kMaxOffset = int64_t{1} << 59;
constexpr int64_t kWindowBeyondAll = int64_t{1} << 62;  // > |q_offset| + Sq + Skv, so as good as unlimited

// What the caller calls them.
struct Names {
  const char *k = "k", *v = "v", *kv_lens = "kv_lens";
};

constexpr Names kCacheNames = {"k_cache", "v_cache", "cache_lens"};

}  // namespace

// Arguments are rewritten in the order in which they are checked; the scores (B,Hq,Sq,Skv) are what the optional arrays
// must fit.
class Canonicalizer {
 public:
  static CanonicalProblem judged(const AttentionProblem& given, Status& status) {
    CanonicalProblem canonical(given);
    status = status_of([&] {
      Canonicalizer x(canonical, {});
      x.judge();
      x.pack({&canonical.q, &canonical.out, &canonical.lse}, {&canonical.k, &canonical.v});
    });
    return canonical;
  }

  static CanonicalGradients judged(const AttentionProblem& given, const AttentionGradients& gradients, Status& status) {
    CanonicalGradients g(gradients, CanonicalProblem(given));
    status = status_of([&] {
      Canonicalizer x(g.problem, {});
      x.judge();
      x.judge_gradients(g);
      x.pack({&g.problem.q, &g.problem.out, &g.problem.lse, &g.dout, &g.dlse, &g.dq},
             {&g.problem.k, &g.problem.v, &g.dk, &g.dv});
    });
    return g;
  }

  static CanonicalUpdate judged(const AttentionProblem& given, const CacheUpdate& update, Status& status) {
    CanonicalUpdate u(update, CanonicalProblem(given));
    status = status_of([&] {
      check_cache(u);
      Canonicalizer(u.problem, kCacheNames).judge();
      check_update(u);
    });
    return u;
  }

 private:
  Canonicalizer(CanonicalProblem& problem, const Names& names)
      : p_(problem), names_(names), layout_(problem.layout), rank_(problem.rank) {}

  template <class Check>
  static Status status_of(Check check) {
    try {
      check();
      return {};
    } catch (Rejection& rejection) {
      return {rejection.kind, std::move(rejection.text)};
    } catch (const std::bad_alloc&) {
      return {ErrorKind::kMemory, "attention: out of memory"};
    }
  }

  void judge() {
    check_dtypes();
    for_each_array([&](const char* name, const TensorView& view) { check_memory(name, view); });
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
    check_sinks();
    check_lens("q_lens", p_.q_lens, scores_[2], "q");
    check_lens(names_.kv_lens, p_.kv_lens, scores_[3], names_.k);
    if (p_.paged()) check_block_table();
    rewrite_q_offset();
    rewrite_numbers();
    rewrite_outputs();
  }

  void judge_gradients(AttentionGradients& g) {
    if (p_.paged()) reject_value("block_table is given, expected none: keys in pages have no gradient");
    const DType accumulator = accumulator_of(p_.q.dtype);
    if (!p_.out.present()) reject_value("out is absent, expected the output of the forward pass");
    if (!p_.lse.present()) reject_value("lse is absent, expected that of the forward pass");
    rewrite_gradient("dout", g.dout, p_.out);
    rewrite_gradient("dq", g.dq, p_.q);
    rewrite_gradient("dk", g.dk, p_.k);
    rewrite_gradient("dv", g.dv, p_.v);
    require_no_overlap("dq", g.dq);
    require_no_overlap("dk", g.dk);
    require_no_overlap("dv", g.dv);
    if (g.dlse.present()) {
      check_gradient("dlse", g.dlse, accumulator);
      rewrite_lse("dlse", g.dlse);
    }
    if (g.dbias.present()) {
      check_gradient("dbias", g.dbias, accumulator);
      require_no_overlap("dbias", g.dbias);
      broadcast_to_scores("dbias", g.dbias);
    }
    if (g.dsinks.present()) {
      check_gradient("dsinks", g.dsinks, accumulator);
      if (!p_.sinks.present()) reject_value("dsinks is given without sinks");
      if (g.dsinks.rank != 1 || g.dsinks.shape[0] != scores_[1])
        reject_shape("dsinks", g.dsinks, "(Hq,) = " + text_of(scores_ + 1, 1));
    }
  }

  void check_gradient(const char* name, const TensorView& view, DType dtype) const {
    if (!view.present()) reject_value(std::string(name) + " is absent");
    if (view.dtype != dtype) reject_dtype(name, view.dtype, name_of(dtype));
    check_memory(name, view);
  }

  void rewrite_gradient(const char* name, TensorView& view, const TensorView& like) const {
    check_gradient(name, view, p_.q.dtype);
    require_rank(name, view, rank_);
    const TensorView caller = view;
    view = canonical_view(view, layout_);
    if (!std::equal(like.shape, like.shape + 4, view.shape)) {
      reject_shape(name, caller, text_of(like.shape, 4) + " in the order (B, H, S, D)");
    }
  }

  static void require_no_overlap(const char* output, const TensorView& written) {
    if (may_overlap_itself(written)) {
      reject_value(std::string(output) + " has elements that share memory, expected an array without overlap");
    }
  }

  void check_dtypes() const {
    const auto require_floating = [](const char* name, const TensorView& view, const char* hint = "") {
      if (!view.present() || is_floating(view.dtype)) return;
      reject_dtype(name, view.dtype, std::string("float32, float64, float16 or bfloat16") + hint);
    };
    const auto require_as_q = [&](const char* name, const TensorView& view) {
      if (view.present() && view.dtype != p_.q.dtype)
        reject_dtype(name, view.dtype, name_of(p_.q.dtype) + std::string(" (from q)"));
    };
    const auto require_integer = [](const char* name, const TensorView& view) {
      if (!view.present() || view.dtype == DType::kInt32 || view.dtype == DType::kInt64) return;
      reject_dtype(name, view.dtype, "int32 or int64");
    };
    require_floating("q", p_.q);
    if (p_.k_scale.present() || p_.v_scale.present()) {
      if (p_.q.dtype == DType::kFloat64)
        reject_dtype("q", p_.q.dtype, "float32, float16 or bfloat16 (the cache is int8)");
      for (const auto& [name, view] : {std::pair(names_.k, &p_.k), std::pair(names_.v, &p_.v)})
        if (view->dtype != DType::kInt8) reject_dtype(name, view->dtype, "int8 (its scales are given)");
    } else {
      require_as_q(names_.k, p_.k);
      require_as_q(names_.v, p_.v);
    }
    require_floating("k_scale", p_.k_scale);
    require_floating("v_scale", p_.v_scale);
    require_integer("cu_seqlens_q", p_.cu_seqlens_q);
    require_integer("cu_seqlens_kv", p_.cu_seqlens_kv);
    require_integer("block_table", p_.block_table);
    require_as_q("out", p_.out);
    require_as_q("weights", p_.weights);
    const DType accumulator = accumulator_of(p_.q.dtype);
    if (p_.lse.present() && p_.lse.dtype != accumulator) reject_dtype("lse", p_.lse.dtype, name_of(accumulator));
    if (p_.mask.present() && p_.mask.dtype != DType::kBool) {
      reject_dtype("mask", p_.mask.dtype, "bool (values that are added to the scores are `bias`)");
    }
    require_floating("bias", p_.bias, p_.bias.dtype == DType::kBool ? " (a bool array is `mask`)" : "");
    require_floating("alibi_slopes", p_.alibi_slopes);
    require_floating("sinks", p_.sinks);
    require_integer("q_lens", p_.q_lens);
    require_integer(names_.kv_lens, p_.kv_lens);
    require_integer("q_offset", p_.q_offset);
  }

  void check_memory(const char* name, const TensorView& view) const {
    if (!(view.device == p_.q.device)) {
      reject_type(std::string(name) + " is on " + text_of(view.device) + ", expected " + text_of(p_.q.device) +
                  " (from q)");
    }
    if (reinterpret_cast<uintptr_t>(view.data) % itemsize(view.dtype) != 0) {
      reject_value(std::string(name) + " is misaligned for " + name_of(view.dtype) +
                   ", expected an aligned array, such as np.ascontiguousarray(" + name + ".copy())");
    }
  }

  // Which of the optional arrays go together.
  void check_combination() const {
    if (p_.packed() != p_.cu_seqlens_kv.present()) {
      reject_value(std::string(p_.packed() ? "cu_seqlens_kv" : "cu_seqlens_q") + " is absent, expected both");
    }
    if (p_.packed()) {
      if (p_.q.rank != 3) reject_value("q has " + dimensions(p_.q.rank) + ", expected 3");
      if (layout_ != Layout::kBshd) reject_value("packed sequences are 'bhsd', expected 'bshd'");
      if (p_.q_lens.present() || p_.kv_lens.present()) reject_value("q_lens or kv_lens is given with cu_seqlens");
      if (p_.weights.present()) reject_value("weights are asked for with cu_seqlens, expected neither or one");
      if (p_.paged()) reject_value("block_table is given with cu_seqlens, expected one of them");
      // Its shape names the longest lengths, which only that device knows.
      if (p_.q.device.type != DeviceType::kCpu && (p_.mask.present() || p_.bias.present())) {
        throw Rejection{ErrorKind::kNotImplemented, std::string("attention: ") + (p_.mask.present() ? "mask" : "bias") +
                                                        " is given with cu_seqlens on " + text_of(p_.q.device) +
                                                        ", expected cpu for both"};
      }
    }
    if (p_.paged()) {
      if (p_.q.rank != 4) reject_value("q has " + dimensions(p_.q.rank) + ", expected 4");
      if (!p_.kv_lens.present()) reject_value("kv_lens is absent, expected the lengths of the paged sequences");
    }
    if (p_.k_scale.present() != p_.v_scale.present()) {
      reject_value(std::string(p_.k_scale.present() ? "v_scale" : "k_scale") + " is absent, expected both");
    }
    if (p_.k_scale.present() && !p_.paged()) reject_value("k_scale is given without block_table");
  }

  // Returns the longest length; that of all tokens together where another device has the values.
  int64_t check_cu_seqlens(const char* name, const TensorView& begins, int64_t total, const char* source) {
    if (begins.rank != 1 || begins.shape[0] < 1) reject_shape(name, begins, "(B + 1,)");
    if (begins.shape[0] != p_.cu_seqlens_q.shape[0]) {
      reject_shape(name, begins, text_of(p_.cu_seqlens_q.shape, 1) + " (from cu_seqlens_q)");
    }
    scores_[0] = begins.shape[0] - 1;
    if (begins.device.type != DeviceType::kCpu) return total;
    int64_t before = 0, longest = 0;
    for_each_integer(begins, [&](int64_t b, int64_t begin) {
      if (begin < before || begin > total) {
        const std::string found = std::string(name) + "[" + std::to_string(b) + "]" + is_integer(begin);
        if (begin > total)
          reject_value(found + ", expected at most " + std::to_string(total) + " (" + source + ".shape[0])");
        reject_value(found + ", expected at least " + std::to_string(before) +
                     (b == 0 ? "" : " (" + std::string(name) + "[" + std::to_string(b - 1) + "])"));
      }
      if (b > 0) longest = std::max(longest, begin - before);
      before = begin;
    });
    return longest;
  }

  void check_block_table() const {
    const TensorView& table = p_.block_table;
    const int64_t page_size = p_.k.shape[kSeq], num_pages = p_.k.shape[kBatch];
    const int64_t judged = table.device.type == DeviceType::kCpu ? table.shape[0] : 0;
    for (int64_t b = 0; b < judged; ++b) {
      const int64_t used = divide_up(load_integer(p_.kv_lens, b), std::max<int64_t>(page_size, 1));
      for (int64_t x = 0; x < used; ++x) {
        const int64_t page = integer_at(table, b * table.stride[0] + x * table.stride[1]);
        if (page >= 0 && page < num_pages) continue;
        reject_value("block_table[" + std::to_string(b) + ", " + std::to_string(x) + "]" + is_integer(page) +
                     ", expected 0 to " + std::to_string(num_pages - 1) + " (" + names_.k + ".shape[0] is " +
                     std::to_string(num_pages) + ")");
      }
    }
    for (const auto& [name, scale] : {std::pair("k_scale", &p_.k_scale), std::pair("v_scale", &p_.v_scale)})
      if (scale->present() && (scale->rank != 2 || !std::equal(scale->shape, scale->shape + 2, p_.k.shape)))
        reject_shape(name, *scale, "(pages, Hkv) = " + text_of(p_.k.shape, 2));
  }

  // Packed arrays, (1,H,T,.) so far, as (B,H,longest,.): element b begins at a row of its own.
  void pack(std::initializer_list<TensorView*> rows, std::initializer_list<TensorView*> keys) {
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

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  void rewrite_qkv() {
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
  void check_sizes() const {
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

  void broadcast_to_scores(const char* name, TensorView& view) const {
    if (!view.present()) return;
    const bool keys_by_batch = view.rank == 2 && view.shape[0] == scores_[0] && view.shape[1] == scores_[3];
    const auto expected = [&] {
      return ", expected an array that broadcasts to (B, Hq, Sq, Skv) = " + text_of(scores_, 4) +
             (keys_by_batch ? std::string("; one of (B, Skv) is ") + name + "[:, None, None, :]" : "");
    };
    if (view.rank > 4) reject_value(name + (" has " + dimensions(view.rank)) + expected());
    TensorView canonical = view;
    canonical.rank = 4;
    for (int axis = 0; axis < 4; ++axis) {
      const int position = axis - (4 - view.rank);
      const int64_t extent = position < 0 ? 1 : view.shape[position];
      if (extent != 1 && extent != scores_[axis]) reject_value(extent_found(name, position, extent) + expected());
      canonical.shape[axis] = scores_[axis];
      canonical.stride[axis] = extent == 1 ? 0 : view.stride[position];
    }
    view = canonical;
  }

  void rewrite_alibi_slopes() {
    TensorView& slopes = p_.alibi_slopes;
    if (!slopes.present()) return;
    const bool per_head = slopes.rank == 1 && slopes.shape[0] == scores_[1];
    const bool per_batch_and_head = slopes.rank == 2 && slopes.shape[0] == scores_[0] && slopes.shape[1] == scores_[1];
    if (!per_head && !per_batch_and_head) {
      reject_shape("alibi_slopes", slopes,
                   "(Hq,) = " + text_of(scores_ + 1, 1) + " or (B, Hq) = " + text_of(scores_, 2));
    }
    if (per_head) {
      slopes.stride[1] = slopes.stride[0];
      slopes.stride[0] = 0;
    }
    slopes.rank = 2;
    slopes.shape[0] = scores_[0];
    slopes.shape[1] = scores_[1];
  }

  void check_sinks() const {
    if (!p_.sinks.present() || (p_.sinks.rank == 1 && p_.sinks.shape[0] == scores_[1])) return;
    reject_shape("sinks", p_.sinks, "(Hq,) = " + text_of(scores_ + 1, 1));
  }

  void check_lens(const char* name, const TensorView& lens, int64_t seqlen, const char* source) const {
    if (!lens.present()) return;
    if (lens.rank != 1 || lens.shape[0] != scores_[0]) reject_shape(name, lens, "(B,) = " + text_of(scores_, 1));
    const bool in_pages = &lens == &p_.kv_lens && p_.paged();
    for_each_integer(lens, [&](int64_t b, int64_t len) {
      if (len >= 0 && len <= seqlen) return;
      reject_value(std::string(name) + "[" + std::to_string(b) + "]" + is_integer(len) + ", expected 0 to " +
                   std::to_string(seqlen) + " (" +
                   (in_pages
                        ? "block_table.shape[1] * page size"
                        : std::string(source) + ".shape[" + std::to_string(position_of(kSeq, rank_, layout_)) + "]") +
                   ")");
    });
  }

  void rewrite_q_offset() {
    TensorView& offset = p_.q_offset;
    if (!offset.present()) return;
    if (offset.rank == 0) {
      offset.rank = 1;
      offset.shape[0] = scores_[0];
      offset.stride[0] = 0;
    }
    if (offset.rank != 1 || offset.shape[0] != scores_[0]) {
      reject_shape("q_offset", offset, "an integer or (B,) = " + text_of(scores_, 1));
    }
    for_each_integer(offset, [](int64_t b, int64_t value) {
      if (value >= -kMaxOffset && value <= kMaxOffset) return;
      reject_value("q_offset[" + std::to_string(b) + "]" + is_integer(value) + ", expected -2^59 to 2^59");
    });
  }

  // Values on another device are for its backend to judge.
  template <typename Visit>
  static void for_each_integer(const TensorView& view, Visit visit) {
    if (view.device.type != DeviceType::kCpu) return;
    for (int64_t b = 0; b < view.shape[0]; ++b) {
      const int64_t offset = b * view.stride[0];
      visit(b, view.dtype == DType::kInt32 ? static_cast<const int32_t*>(view.data)[offset]
                                           : static_cast<const int64_t*>(view.data)[offset]);
    }
  }

  void rewrite_numbers() {
    const auto rewrite_window = [](const char* name, int64_t& width) {
      if (width < 0 && width != kUnlimited)
        reject_value(name + (" is " + std::to_string(width)) + ", expected at least 0");
      if (width >= kWindowBeyondAll) width = kUnlimited;
    };
    rewrite_window("window[0]", p_.window_left);
    rewrite_window("window[1]", p_.window_right);
    if (!p_.has_scale) p_.scale = 1.0 / std::sqrt(static_cast<double>(p_.q.shape[kDim]));
    p_.has_scale = true;
    if (!std::isfinite(p_.scale)) reject_value("scale is " + text_of(p_.scale) + ", expected a finite number");
    if (!std::isfinite(p_.softcap) || p_.softcap < 0.0) {
      reject_value("softcap is " + text_of(p_.softcap) + ", expected a finite number of at least 0");
    }
    if (!(p_.dropout_p >= 0.0 && p_.dropout_p <= 1.0))
      reject_value("dropout_p is " + text_of(p_.dropout_p) + ", expected 0 to 1");
    // Kernels have both in the accumulator type and in base 2.
    const bool in_double = p_.q.dtype == DType::kFloat64;
    const double most = (in_double ? DBL_MAX : double{FLT_MAX}) / std::numbers::log2e;
    if (std::fabs(p_.scale) > most) {
      reject_value("scale is " + text_of(p_.scale) + ", expected a magnitude of at most " + text_of(most) + " for " +
                   name_of(p_.q.dtype));
    }
    // No score reaches so high a cap; and all below the smallest cap are as good as 0.
    if (p_.softcap > most) p_.softcap = 0.0;
    if (p_.softcap > 0.0) p_.softcap = std::max(p_.softcap, in_double ? DBL_MIN : double{FLT_MIN});
  }

  void rewrite_outputs() {
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
    require_own_memory("out", p_.out);
    require_own_memory("lse", p_.lse);
    require_own_memory("weights", p_.weights);
  }

  void rewrite_lse(const char* name, TensorView& lse) const {
    if (lse.rank != 3) {
      require_rank(name, lse, rank_ - 1);
      lse = canonical_lse(lse);
    }
    if (!std::equal(rows_, rows_ + 3, lse.shape)) reject_shape(name, lse, "(B, Hq, Sq) = " + text_of(rows_, 3));
  }

  void require_own_memory(const char* output, const TensorView& written) const {
    if (!written.present()) return;
    require_no_overlap(output, written);
    for_each_array([&](const char* name, const TensorView& view) {
      if (&view == &written || !may_overlap(written, view)) return;
      reject_value(std::string(output) + " shares memory with " + name + ", expected a separate array");
    });
  }

  void require_rank(const char* name, const TensorView& view, int rank) const {
    if (view.rank != rank)
      reject_value(name + (" has " + dimensions(view.rank)) + ", expected " + std::to_string(rank) + " (from q)");
  }

  // `view` is canonical; the text names the axis of the caller's array.
  void require_extent(const char* name, const TensorView& view, Axis axis, const char* what, int64_t expected,
                      const char* source) const {
    if (view.shape[axis] == expected) return;
    reject_value(extent_found(name, position_of(axis, rank_, layout_), view.shape[axis]) + ", expected " + what + " " +
                 std::to_string(expected) + " (from " + source + ")");
  }

  template <typename Visit>
  void for_each_array(Visit visit) const {
    const auto visit_present = [&](const char* name, const TensorView& view) {
      if (view.present()) visit(name, view);
    };
    visit_present("q", p_.q);
    visit_present(names_.k, p_.k);
    visit_present(names_.v, p_.v);
    visit_present("mask", p_.mask);
    visit_present("bias", p_.bias);
    visit_present("alibi_slopes", p_.alibi_slopes);
    visit_present("sinks", p_.sinks);
    visit_present("q_lens", p_.q_lens);
    visit_present(names_.kv_lens, p_.kv_lens);
    visit_present("q_offset", p_.q_offset);
    visit_present("cu_seqlens_q", p_.cu_seqlens_q);
    visit_present("cu_seqlens_kv", p_.cu_seqlens_kv);
    visit_present("block_table", p_.block_table);
    visit_present("k_scale", p_.k_scale);
    visit_present("v_scale", p_.v_scale);
    visit_present("out", p_.out);
    visit_present("lse", p_.lse);
    visit_present("weights", p_.weights);
  }

  CanonicalProblem& p_;
  const Names names_;
  const Layout layout_;     // the caller's
  const int rank_;          // the caller's, of q
  int64_t scores_[4] = {};  // of a batch element at most, packed or not
  int64_t rows_[3] = {};    // (B,Hq,Sq) of the caller's q; packed: (1,Hq,Tq)
};

CanonicalProblem canonicalize(const AttentionProblem& problem, Status& status) {
  return Canonicalizer::judged(problem, status);
}

CanonicalGradients canonicalize(const AttentionProblem& problem, const AttentionGradients& gradients, Status& status) {
  return Canonicalizer::judged(problem, gradients, status);
}

CanonicalUpdate canonicalize(const AttentionProblem& problem, const CacheUpdate& update, Status& status) {
  return Canonicalizer::judged(problem, update, status);
}

TensorView CanonicalProblem::wanted(Result result) const {
  const int64_t rows = packed() ? packed_rows : q.shape[kSeq];
  const int64_t last = result == Result::kOut ? v.shape[kDim] : k.shape[kSeq];
  const int64_t whole[] = {q.shape[kBatch], q.shape[kHead], rows, last};
  TensorView view;
  view.dtype = result == Result::kLse ? accumulator_of(q.dtype) : q.dtype;
  view.device = q.device;
  view.rank = result == Result::kLse ? rank - 1 : rank;
  for (int axis = 0; axis < 4; ++axis) {
    const int position = position_of(axis, rank, result == Result::kOut ? layout : Layout::kBhsd);
    if (position >= 0) view.shape[position] = whole[axis];
  }
  return view;
}

void CanonicalProblem::take(Result result, const TensorView& made) {
  TensorView& view = result == Result::kOut ? out : result == Result::kLse ? lse : weights;
  view = result == Result::kOut   ? canonical_view(made, layout)
         : result == Result::kLse ? canonical_lse(made)
                                  : canonical_view(made, Layout::kBhsd);
  if (!packed()) return;
  view.shape[kBatch] = q.shape[kBatch];
  view.shape[kSeq] = q.shape[kSeq];
}

}  // namespace foveal
