// What is asked of arrays one by one: dtype, device, alignment, memory of its own; and which of them go together.
#include <string>
#include <type_traits>
#include <utility>

#include "attention/canonical/canonicalizer.h"
#include "attention/members.h"
#include "attention/overlap.h"
#include "attention/rejection.h"

namespace foveal {
namespace {

// Calls visit(name, view) for those that are there.
template <class Visit>
void for_each_array(const CanonicalProblem& p, const Names& names, Visit visit) {
  using P = AttentionProblem;
  for_each_member<P>([&]<class Member>(const char* name, Member P::* member) {
    if constexpr (std::is_same_v<Member, TensorView>) {
      const TensorView& view = p.*member;
      if (!view.present()) return;
      if (member == &P::k) name = names.k;
      if (member == &P::v) name = names.v;
      if (member == &P::kv_lens) name = names.kv_lens;
      if (member == &P::additive) name = "u";
      if (member == &P::gate_tau) name = "gate[0]";
      if (member == &P::gate_temperature) name = "gate[1]";
      if (member == &P::span) name = "span[0]";
      visit(name, view);
    }
  });
}

}  // namespace

void Canonicalizer::check_dtypes() const {
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
  require_floating("u", p_.additive);
  if (p_.additive.present() && p_.q.dtype != accumulator_of(p_.q.dtype))
    reject_dtype("q", p_.q.dtype, "float32 or float64 (scores are additive)");
  require_floating("gate[0]", p_.gate_tau);
  require_floating("gate[1]", p_.gate_temperature);
  require_floating("span[0]", p_.span);
  require_integer("q_lens", p_.q_lens);
  require_integer(names_.kv_lens, p_.kv_lens);
  require_integer("q_offset", p_.q_offset);
}

void Canonicalizer::check_memory() const {
  for_each_array(p_, names_, [&](const char* name, const TensorView& view) { check_memory(name, view); });
}

void Canonicalizer::check_memory(const char* name, const TensorView& view) const {
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
void Canonicalizer::check_combination() const {
  if (p_.additive.present() && (p_.packed() || p_.paged()))
    throw Rejection{{ErrorKind::kNotImplemented, "additive scores with cu_seqlens or block_table are not implemented"}};
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
      throw Rejection{{ErrorKind::kNotImplemented, std::string(p_.mask.present() ? "mask" : "bias") +
                                                       " is given with cu_seqlens on " + text_of(p_.q.device) +
                                                       ", expected cpu for both"}};
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

void Canonicalizer::require_own_memory(const char* output, const TensorView& written) const {
  if (!written.present()) return;
  require_no_overlap(output, written);
  for_each_array(p_, names_, [&](const char* name, const TensorView& view) {
    if (&view == &written || !may_overlap(written, view)) return;
    reject_value(std::string(output) + " shares memory with " + name + ", expected a separate array");
  });
}

void Canonicalizer::require_no_overlap(const char* output, const TensorView& written) {
  if (may_overlap_itself(written)) {
    reject_value(std::string(output) + " has elements that share memory, expected an array without overlap");
  }
}

}  // namespace foveal
