#include "cuda/operands.h"

#include <algorithm>
#include <span>
#include <string_view>
#include <type_traits>

#include "attention/members.h"
#include "attention/rejection.h"

namespace foveal::cuda {
namespace {

Array array_of(const TensorView& view) {
  Array a;
  if (!view.present()) return a;
  a.data = view.data;
  a.dtype = view.dtype;
  for (int i = 0; i < std::min(view.rank, 4); ++i) a.stride[i] = view.shape[i] == 1 ? 0 : view.stride[i];
  return a;
}

int window_side(int64_t side) {
  return side == kUnlimited ? kNoLimit : static_cast<int>(std::min<int64_t>(side, kNoLimit));
}

// With pages: what those of one sequence hold.
int64_t seqlen_kv_of(const CanonicalProblem& p) {
  if (!p.paged()) return p.k.shape[2];
  return p.k.shape[0] > 0 ? p.block_table.shape[1] * p.k.shape[2] : 0;
}

// What the kernels compute. Whoever adds a member to a problem adds it here once they do.
constexpr std::string_view kSupported[] = {
    "q",
    "k",
    "v",
    "out",
    "lse",
    "weights",
    "mask",
    "bias",
    "sinks",
    "alibi_slopes",
    "q_lens",
    "kv_lens",
    "q_offset",
    "layout",
    "causal",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "block_table",
    "window_left",
    "window_right",
    "scale",
    "has_scale",
    "softcap",
    "seed",  // says nothing without dropout_p
};
constexpr std::string_view kSupportedGradients[] = {"dout", "dlse", "dq", "dk", "dv", "dbias", "dsinks"};

bool at_default(const TensorView& view, const TensorView&) { return !view.present(); }
template <class Number>
bool at_default(Number number, Number other) {
  return number == other;
}

std::string text_of_lack(const char* name, const TensorView&) { return name + std::string(" is given"); }
template <class Number>
std::string text_of_lack(const char* name, Number other) {
  return name + std::string(" is not ") + text_of(static_cast<double>(other));
}

template <class Struct>
Status check_members(const Struct& given, std::span<const std::string_view> supported) {
  Status status;
  for_each_member<Struct>([&]<class Member>(const char* name, Member Struct::* member) {
    const Member other = Struct{}.*member;
    if (!status.ok() || at_default(given.*member, other)) return;
    if (std::find(supported.begin(), supported.end(), name) != supported.end()) return;
    status = refuse(ErrorKind::kNotImplemented, text_of_lack(name, other) + ", which the CUDA backend lacks");
  });
  return status;
}

}  // namespace

Status refuse(ErrorKind kind, const std::string& text) { return {kind, text}; }

bool loads_in_chunks(const TensorView& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0 || view.shape[3] % 8 != 0) return false;
  if (view.stride[3] != 1) return false;
  for (int i = 0; i < 3; ++i) {
    if (view.shape[i] > 1 && view.stride[i] % 8 != 0) return false;
  }
  return true;
}

Status check_supported(const CanonicalProblem& p) {
  const struct {
    const char* name;
    int64_t value, limit;
  } extents[] = {
      {"head_dim", p.q.shape[3], kMaxHeadDim},    {"v.shape[-1]", p.v.shape[3], kMaxHeadDim},
      {"seqlen_q", p.q.shape[2], kPositionLimit}, {"seqlen_kv", seqlen_kv_of(p), kPositionLimit},
      {"batch", p.q.shape[0], kPositionLimit},    {"num_heads", p.q.shape[1], kPositionLimit},
  };
  for (const auto& e : extents) {
    if (e.value > e.limit) {
      return refuse(ErrorKind::kNotImplemented, std::string(e.name) + " is " + std::to_string(e.value) +
                                                    ", the CUDA backend takes at most " + std::to_string(e.limit));
    }
  }
  return check_members<AttentionProblem>(p, kSupported);
}

Status check_supported(const CanonicalGradients& g) {
  const Status status = check_supported(g.problem);
  return status.ok() ? check_members<AttentionGradients>(g, kSupportedGradients) : status;
}

Params params_of(const CanonicalProblem& problem) {
  Params p;
  p.q = array_of(problem.q);
  p.k = array_of(problem.k);
  p.v = array_of(problem.v);
  p.out = array_of(problem.out);
  p.lse = array_of(problem.lse);
  p.weights = array_of(problem.weights);
  p.mask = array_of(problem.mask);
  p.bias = array_of(problem.bias);
  p.alibi_slopes = array_of(problem.alibi_slopes);
  p.sinks = array_of(problem.sinks);
  p.q_lens = array_of(problem.q_lens);
  p.kv_lens = array_of(problem.kv_lens);
  p.q_offset = array_of(problem.q_offset);
  p.cu_seqlens_q = array_of(problem.cu_seqlens_q);
  p.cu_seqlens_kv = array_of(problem.cu_seqlens_kv);
  p.batch = static_cast<int>(problem.q.shape[0]);
  p.num_heads = static_cast<int>(problem.q.shape[1]);
  p.num_kv_heads = static_cast<int>(problem.k.shape[1]);
  p.group = p.num_kv_heads > 0 ? p.num_heads / p.num_kv_heads : 1;
  p.seqlen_q = static_cast<int>(problem.q.shape[2]);
  p.seqlen_kv = static_cast<int>(seqlen_kv_of(problem));
  if (problem.paged()) {
    p.block_table = array_of(problem.block_table);
    p.num_pages = static_cast<int>(problem.k.shape[0]);
    p.page_size = static_cast<int>(problem.k.shape[2]);
  }
  p.head_dim = static_cast<int>(problem.q.shape[3]);
  p.value_dim = static_cast<int>(problem.v.shape[3]);
  p.window_left = window_side(problem.window_left);
  p.window_right = problem.causal ? 0 : window_side(problem.window_right);
  p.scale = problem.scale;
  p.softcap = problem.softcap;
  return p;
}

void add_gradients(const CanonicalGradients& gradients, Params& p) {
  p.dout = array_of(gradients.dout);
  p.dlse = array_of(gradients.dlse);
  p.dq = array_of(gradients.dq);
  p.dk = array_of(gradients.dk);
  p.dv = array_of(gradients.dv);
  p.dbias = array_of(gradients.dbias);
  p.dsinks = array_of(gradients.dsinks);
}

}  // namespace foveal::cuda
