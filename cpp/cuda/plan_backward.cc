#include <algorithm>

#include "cuda/kernel_list.h"
#include "cuda/plan.h"
#include "cuda/shape.h"

namespace foveal::cuda {
namespace {

struct KernelShape {
  int id;
  int head_dim;
  bool owns_keys;
  int owned;
  int num_threads;
  int shared_nbytes;
};

constexpr KernelShape kKernels[] = {
#define FOVEAL_ROW(id, dim, owns_keys, m_tiles, walked, warps, parts) \
  {id,           dim,                                                 \
   owns_keys,    backward_owned_rows(m_tiles, warps, parts),          \
   (warps) * 32, backward_shared_nbytes(dim, backward_owned_rows(m_tiles, warps, parts), walked)},
    FOVEAL_CUDA_BACKWARD_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
};

struct PlainShape {
  int first_id;
  int num_threads;
  int rows;
};

constexpr PlainShape kPlainShapes[] = {
#define FOVEAL_ROW(id, real, warps, rows) {id, (warps) * 32, (warps) * (rows)},
    FOVEAL_CUDA_PLAIN_BACKWARD_KERNELS(FOVEAL_ROW)
#undef FOVEAL_ROW
};

// A variant names a kernel of one of the two launches; the other keeps its default.
Step mma_step(const Params& p, bool owns_keys, int shared_limit, int variant) {
  const int dim = std::max(p.head_dim, p.value_dim);
  const bool forced = std::any_of(std::begin(kKernels), std::end(kKernels), [&](const KernelShape& kernel) {
    return kernel.id == variant && kernel.owns_keys == owns_keys;
  });
  for (const KernelShape& kernel : kKernels) {
    if (kernel.owns_keys != owns_keys || kernel.head_dim < dim || kernel.shared_nbytes > shared_limit) continue;
    if (forced && kernel.id != variant) continue;
    const int64_t blocks = owns_keys ? blocks_of_head(p, p.seqlen_kv, kernel.owned) * p.num_kv_heads
                                     : blocks_of_head(p, p.seqlen_q, kernel.owned) * p.num_heads;
    return {kernel.id, blocks, kernel.num_threads, kernel.shared_nbytes};
  }
  return {};
}

// As BiasGrid of backward_bias.h counts them.
int64_t bias_blocks(const Params& p, int rows) {
  const auto blocks = [&](int axis, int64_t count) { return p.dbias.stride[axis] == 0 ? 1 : count; };
  return blocks(0, p.batch) * blocks(1, p.num_heads) * blocks(2, divide_up(p.seqlen_q, rows)) *
         blocks(3, divide_up(p.seqlen_kv, kPlainKeys));
}

}  // namespace

Status make_backward_plan(const CanonicalGradients& g, int shared_limit, int variant, Plan& plan) {
  const CanonicalProblem& problem = g.problem;
  plan = Plan{};
  plan.dtype = problem.q.dtype;
  if (Status status = check_supported(g); !status.ok()) return status;
  plan.params = params_of(problem);
  add_gradients(g, plan.params);
  Params& p = plan.params;
  const bool packed = p.cu_seqlens_q.data != nullptr;
  p.row_pitch = static_cast<int>(
      (packed ? blocks_of_head(p, p.seqlen_q, kRowPitch) : divide_up(p.seqlen_q, kRowPitch)) * kRowPitch);

  const bool wide = plan.dtype == DType::kFloat64;
  const PlainShape& plain = kPlainShapes[wide ? 1 : 0];
  const int itemsize = wide ? 8 : 4;
  const int64_t num_rows = static_cast<int64_t>(packed ? 1 : p.batch) * p.num_heads * p.row_pitch;
  plan.workspace_nbytes = 2 * num_rows * itemsize;
  plan.add({plain.first_id + kPrepareRows, blocks_of_head(p, p.seqlen_q, kRowPitch) * p.num_heads, kPrepareThreads, 0});

  const int shared = plain_backward_shared_nbytes(itemsize, plain.rows, p.head_dim, p.value_dim);
  const bool half = plan.dtype == DType::kFloat16 || plan.dtype == DType::kBFloat16;
  const TensorView* operands[] = {&problem.q, &problem.k, &problem.v, &g.dout, &g.dq, &g.dk, &g.dv};
  const bool chunks = std::all_of(std::begin(operands), std::end(operands),
                                  [](const TensorView* view) { return loads_in_chunks(*view); });
  plan.path = Path::kBackwardPlain;
  Step rows = half && chunks && p.head_dim > 0 && p.value_dim > 0 ? mma_step(p, false, shared_limit, variant) : Step{};
  Step keys = rows.kernel != kDefaultVariant ? mma_step(p, true, shared_limit, variant) : Step{};
  if (keys.kernel != kDefaultVariant) {
    plan.path = Path::kBackward;
  } else {
    rows = {plain.first_id + kPlainRows, blocks_of_head(p, p.seqlen_q, plain.rows) * p.num_heads, plain.num_threads,
            shared};
    keys = {plain.first_id + kPlainKeyRows, blocks_of_head(p, p.seqlen_kv, plain.rows) * p.num_kv_heads,
            plain.num_threads, shared};
  }
  if (variant != kDefaultVariant && rows.kernel != variant && keys.kernel != variant) {
    return refuse(ErrorKind::kValue,
                  "variant is " + std::to_string(variant) + ", which does not fit this problem or device");
  }
  plan.add(rows);
  plan.add(keys);
  if (p.dbias.data) {
    const int sums = plain.rows * kPlainKeys * itemsize;
    plan.add({plain.first_id + kPlainBias, bias_blocks(p, plain.rows), plain.num_threads, std::max(shared, sums)});
  }
  if (p.dsinks.data) {
    plan.add({plain.first_id + kPlainSinks, p.num_heads, kSinkThreads, kSinkThreads / 32 * itemsize});
  }
  if (plan.num_steps == 0) plan.path = Path::kEmpty;
  return check_steps(plan, shared_limit);
}

}  // namespace foveal::cuda
