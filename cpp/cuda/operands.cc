#include "cuda/operands.h"

#include <algorithm>

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

}  // namespace

Status refuse(ErrorKind kind, const std::string& text) { return {kind, "attention: " + text}; }

bool loads_in_chunks(const TensorView& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0 || view.shape[3] % 8 != 0) return false;
  if (view.stride[3] != 1) return false;
  for (int i = 0; i < 3; ++i) {
    if (view.shape[i] > 1 && view.stride[i] % 8 != 0) return false;
  }
  return true;
}

Status check_extents(const CanonicalProblem& p) {
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
  if (p.dropout_p != 0.0) return refuse(ErrorKind::kNotImplemented, "dropout_p is not 0, which the CUDA backend lacks");
  if (p.k_scale.present()) return refuse(ErrorKind::kNotImplemented, "k_scale is given, which the CUDA backend lacks");
  return {};
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
