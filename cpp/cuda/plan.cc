#include "cuda/plan.h"

#include <algorithm>
#include <limits>

#include "cuda/kernel_list.h"
#include "cuda/shape.h"

namespace foveal::cuda {
namespace {

struct KernelShape {
  int id;
  Path path;
  int head_dim;
  int block_m;
  bool policies;
  int num_threads;
  int shared_nbytes;
};

constexpr KernelShape kKernels[] = {
#define FOVEAL_ROW(id, dim, block_m, block_n, warps, policies) \
  {id, Path::kForward, dim, block_m, policies, (warps) * 32, forward_shared_nbytes(dim, block_m, block_n)},
    FOVEAL_CUDA_FORWARD_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
#define FOVEAL_ROW(id, dim, warps, stages) \
  {id, Path::kDecode, dim, kPackedRows, true, (warps) * 32, decode_shared_nbytes(dim, warps, stages)},
        FOVEAL_CUDA_DECODE_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
};

Status refuse(ErrorKind kind, std::string text) { return {kind, "attention: " + std::move(text)}; }

Array array_of(const TensorView& view) {
  Array a;
  if (!view.present()) return a;
  a.data = view.data;
  a.dtype = view.dtype;
  for (int i = 0; i < std::min(view.rank, 4); ++i) a.stride[i] = view.shape[i] == 1 ? 0 : view.stride[i];
  return a;
}

// Rows that begin 16-byte aligned and lie dense, so that cp.async can fetch 8 elements at a time.
bool loads_in_chunks(const TensorView& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0 || view.shape[3] % 8 != 0) return false;
  if (view.stride[3] != 1) return false;
  for (int i = 0; i < 3; ++i) {
    if (view.shape[i] > 1 && view.stride[i] % 8 != 0) return false;
  }
  return true;
}

Status check_extents(const AttentionProblem& p) {
  const struct {
    const char* name;
    int64_t value, limit;
  } extents[] = {
      {"head_dim", p.q.shape[3], kMaxHeadDim},    {"v.shape[-1]", p.v.shape[3], kMaxHeadDim},
      {"seqlen_q", p.q.shape[2], kPositionLimit}, {"seqlen_kv", p.k.shape[2], kPositionLimit},
      {"batch", p.q.shape[0], kPositionLimit},    {"num_heads", p.q.shape[1], kPositionLimit},
  };
  for (const auto& e : extents) {
    if (e.value > e.limit) {
      return refuse(ErrorKind::kNotImplemented, std::string(e.name) + " is " + std::to_string(e.value) +
                                                    ", the CUDA backend takes at most " + std::to_string(e.limit));
    }
  }
  if (p.dropout_p != 0.0) return refuse(ErrorKind::kNotImplemented, "dropout_p is not 0, which the CUDA backend lacks");
  if (p.packed()) return refuse(ErrorKind::kNotImplemented, "cu_seqlens_q is given, which the CUDA backend lacks");
  if (p.paged()) return refuse(ErrorKind::kNotImplemented, "block_table is given, which the CUDA backend lacks");
  return {};
}

int window_side(int64_t side) {
  return side == kUnlimited ? kNoLimit : static_cast<int>(std::min<int64_t>(side, kNoLimit));
}

Params params_of(const AttentionProblem& problem) {
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
  p.batch = static_cast<int>(problem.q.shape[0]);
  p.num_heads = static_cast<int>(problem.q.shape[1]);
  p.num_kv_heads = static_cast<int>(problem.k.shape[1]);
  p.group = p.num_kv_heads > 0 ? p.num_heads / p.num_kv_heads : 1;
  p.seqlen_q = static_cast<int>(problem.q.shape[2]);
  p.seqlen_kv = static_cast<int>(problem.k.shape[2]);
  p.head_dim = static_cast<int>(problem.q.shape[3]);
  p.value_dim = static_cast<int>(problem.v.shape[3]);
  p.window_left = window_side(problem.window_left);
  p.window_right = problem.causal ? 0 : window_side(problem.window_right);
  p.scale = problem.scale;
  p.softcap = problem.softcap;
  return p;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const KernelShape* choose_kernel(Path path, int dim, bool policies, int shared_limit, int variant) {
  for (const KernelShape& kernel : kKernels) {
    if (kernel.path != path || kernel.head_dim < dim || kernel.shared_nbytes > shared_limit) continue;
    if (policies && !kernel.policies) continue;
    if (variant == kDefaultVariant ? (path == Path::kForward && kernel.policies != policies) : kernel.id != variant)
      continue;
    return &kernel;
  }
  return nullptr;
}

void plan_plain(Plan& plan) {
  const bool wide = plan.dtype == DType::kFloat64;
  const Params& p = plan.params;
  const int rows = wide ? kPlainRowsDouble : kPlainRowsFloat;
  plan.path = Path::kPlain;
  plan.variant = wide ? 61 : 60;
  plan.num_threads = wide ? kPlainThreadsDouble : kPlainThreadsFloat;
  plan.shared_nbytes = plain_shared_nbytes(wide ? 8 : 4, rows, p.head_dim, p.value_dim);
  plan.num_blocks = ceil_div(p.seqlen_q, rows) * p.num_heads * p.batch;
}

}  // namespace

Status make_plan(const AttentionProblem& problem, int shared_limit, int variant, Plan& plan) {
  plan = Plan{};
  plan.dtype = problem.q.dtype;
  if (Status status = check_extents(problem); !status.ok()) return status;
  plan.params = params_of(problem);
  const Params& p = plan.params;
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0) return {};

  const bool half = plan.dtype == DType::kFloat16 || plan.dtype == DType::kBFloat16;
  const bool chunks = loads_in_chunks(problem.q) &&
                      (p.seqlen_kv == 0 || (loads_in_chunks(problem.k) && loads_in_chunks(problem.v))) &&
                      loads_in_chunks(problem.out);
  if (!half || !chunks || p.head_dim == 0 || p.value_dim == 0 || problem.weights.present()) {
    if (variant != kDefaultVariant) {
      return refuse(ErrorKind::kValue,
                    "variant is " + std::to_string(variant) + ", expected the default on the plain path");
    }
    plan_plain(plan);
  } else {
    const bool policies = p.mask.data || p.bias.data || p.alibi_slopes.data || p.softcap > 0.0 || !(p.scale > 0.0);
    const int64_t rows = static_cast<int64_t>(p.seqlen_q) * p.group;
    plan.path = rows <= kDecodeRows ? Path::kDecode : Path::kForward;
    const KernelShape* kernel =
        choose_kernel(plan.path, std::max(p.head_dim, p.value_dim), policies, shared_limit, variant);
    if (kernel == nullptr) {
      return refuse(ErrorKind::kValue,
                    "variant is " + std::to_string(variant) + ", which does not fit this problem or device");
    }
    plan.variant = kernel->id;
    plan.num_threads = kernel->num_threads;
    plan.shared_nbytes = kernel->shared_nbytes;
    if (plan.path == Path::kForward) {
      plan.num_blocks = ceil_div(p.seqlen_q, kernel->block_m) * p.num_heads * p.batch;
    } else {
      plan.params.num_splits = static_cast<int>(std::max<int64_t>(1, ceil_div(p.seqlen_kv, kSplitKeys)));
      plan.num_blocks = ceil_div(rows, kPackedRows) * p.num_splits * p.num_kv_heads * p.batch;
      if (p.num_splits > 1) {
        const int64_t out_rows = static_cast<int64_t>(p.batch) * p.num_heads * p.seqlen_q;
        plan.combine_blocks = ceil_div(out_rows, kCombineRows);
        plan.workspace_nbytes = p.num_splits * out_rows * (p.value_dim + 1) * static_cast<int64_t>(sizeof(float));
      }
    }
  }
  if (plan.num_blocks > std::numeric_limits<int32_t>::max()) {
    return refuse(ErrorKind::kNotImplemented,
                  std::to_string(plan.num_blocks) + " blocks are more than one CUDA launch takes");
  }
  if (plan.shared_nbytes > shared_limit) {
    return refuse(ErrorKind::kNotImplemented, "needs " + std::to_string(plan.shared_nbytes) +
                                                  " bytes of shared memory, the device has " +
                                                  std::to_string(shared_limit));
  }
  return {};
}

void bind_workspace(Plan& plan, void* workspace) {
  if (plan.workspace_nbytes == 0) return;
  Params& p = plan.params;
  p.partial_out = static_cast<float*>(workspace);
  p.partial_lse = p.partial_out + static_cast<int64_t>(p.num_splits) * p.batch * p.num_heads * p.seqlen_q * p.value_dim;
}

}  // namespace foveal::cuda
