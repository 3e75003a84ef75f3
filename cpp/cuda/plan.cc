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
  plan.add({wide ? 61 : 60, blocks_of_head(p, p.seqlen_q, rows) * p.num_heads,
            wide ? kPlainThreadsDouble : kPlainThreadsFloat,
            plain_shared_nbytes(wide ? 8 : 4, rows, p.head_dim, p.value_dim)});
}

}  // namespace

Status make_plan(const CanonicalProblem& problem, int shared_limit, int variant, Plan& plan) {
  plan = Plan{};
  plan.dtype = problem.q.dtype;
  if (Status status = check_supported(problem); !status.ok()) return status;
  plan.params = params_of(problem);
  const Params& p = plan.params;
  if ((p.batch == 0 && !p.cu_seqlens_q.data) || p.num_heads == 0 || p.seqlen_q == 0) return {};

  const bool half = plan.dtype == DType::kFloat16 || plan.dtype == DType::kBFloat16;
  const bool chunks = loads_in_chunks(problem.q) &&
                      (p.seqlen_kv == 0 || (loads_in_chunks(problem.k) && loads_in_chunks(problem.v))) &&
                      loads_in_chunks(problem.out);
  const int64_t rows = static_cast<int64_t>(p.seqlen_q) * p.group;
  const bool decode = rows <= kDecodeRows && !p.cu_seqlens_q.data;
  const bool loadable = half && chunks && p.head_dim > 0 && p.value_dim > 0 && (decode || !p.block_table.data);
  if (!loadable || problem.weights.present()) {
    if (variant != kDefaultVariant) {
      return refuse(ErrorKind::kValue,
                    "variant is " + std::to_string(variant) + ", expected the default on the plain path");
    }
    plan_plain(plan);
  } else {
    const bool policies = p.mask.data || p.bias.data || p.alibi_slopes.data || p.softcap > 0.0 || !(p.scale > 0.0);
    plan.path = decode ? Path::kDecode : Path::kForward;
    const KernelShape* kernel =
        choose_kernel(plan.path, std::max(p.head_dim, p.value_dim), policies, shared_limit, variant);
    if (kernel == nullptr) {
      return refuse(ErrorKind::kValue,
                    "variant is " + std::to_string(variant) + ", which does not fit this problem or device");
    }
    Step step{kernel->id, 0, kernel->num_threads, kernel->shared_nbytes};
    if (plan.path == Path::kForward) {
      step.num_blocks = blocks_of_head(p, p.seqlen_q, kernel->block_m) * p.num_heads;
      plan.add(step);
    } else {
      plan.params.num_splits = static_cast<int>(std::max<int64_t>(1, divide_up(p.seqlen_kv, kSplitKeys)));
      step.num_blocks = divide_up(rows, kPackedRows) * p.num_splits * p.num_kv_heads * p.batch;
      plan.add(step);
      if (p.num_splits > 1) {
        const int64_t out_rows = static_cast<int64_t>(p.batch) * p.num_heads * p.seqlen_q;
        plan.add({kCombineKernel, divide_up(out_rows, kCombineRows), kCombineRows * 32, 0});
        plan.workspace_nbytes = p.num_splits * out_rows * (p.value_dim + 1) * static_cast<int64_t>(sizeof(float));
      }
    }
  }
  return check_steps(plan, shared_limit);
}

Status check_steps(const Plan& plan, int shared_limit) {
  for (int i = 0; i < plan.num_steps; ++i) {
    const Step& step = plan.steps[i];
    if (step.num_blocks > std::numeric_limits<int32_t>::max()) {
      return refuse(ErrorKind::kNotImplemented,
                    std::to_string(step.num_blocks) + " blocks are more than one CUDA launch takes");
    }
    if (step.shared_nbytes > shared_limit) {
      return refuse(ErrorKind::kNotImplemented, "needs " + std::to_string(step.shared_nbytes) +
                                                    " bytes of shared memory, the device has " +
                                                    std::to_string(shared_limit));
    }
  }
  return {};
}

void bind_workspace(Plan& plan, void* workspace) {
  if (plan.workspace_nbytes == 0) return;
  Params& p = plan.params;
  if (p.row_pitch > 0) {
    p.row_lse = workspace;
    p.row_delta = static_cast<char*>(workspace) + plan.workspace_nbytes / 2;
  } else {
    p.partial_out = static_cast<float*>(workspace);
    p.partial_lse =
        p.partial_out + static_cast<int64_t>(p.num_splits) * p.batch * p.num_heads * p.seqlen_q * p.value_dim;
  }
}

}  // namespace foveal::cuda
