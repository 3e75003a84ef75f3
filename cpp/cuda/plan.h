// From a CanonicalProblem to what will be launched: path, kernels, grids, splits, workspace. Host only, no CUDA: the
// whole decision can be tested on a machine without a GPU.
//
//   kEmpty           no query row: nothing is launched
//   kPlain           float32, float64, strides or extents that 16-byte loads cannot take, `weights`, many rows of pages
//   kForward         16-bit elements, many query rows, or packed sequences
//   kDecode          16-bit elements, at most kDecodeRows query rows per key/value head: keys are split, then merged;
//                    they may lie in pages
//   kBackward        16-bit elements: dq, then dk and dv, by tensor cores
//   kBackwardPlain   the rest, as above
//
// Nothing here depends on the batch size or the number of heads except grid and workspace sizes, so neither do a row's
// bits.
#pragma once

#include <cstdint>

#include "attention/divide_up.h"
#include "cuda/operands.h"
#include "cuda/params.h"
#include "foveal/attention.h"

namespace foveal::cuda {

enum class Path : uint8_t { kEmpty, kPlain, kForward, kDecode, kBackward, kBackwardPlain };

constexpr int kDefaultVariant = -1;
constexpr int kDecodeRows = 64;
constexpr int kMaxSteps = 5;

struct Step {
  int kernel = kDefaultVariant;  // id in kernel_list.h
  int64_t num_blocks = 0;
  int num_threads = 0;
  int shared_nbytes = 0;
};

struct Plan {
  Path path = Path::kEmpty;
  DType dtype = DType::kFloat32;
  Step steps[kMaxSteps];  // launched in this order on one stream
  int num_steps = 0;
  int64_t workspace_nbytes = 0;
  Params params;  // all but the workspace pointers

  void add(const Step& step) {
    if (step.num_blocks > 0) steps[num_steps++] = step;
  }
};

// `shared_limit`: bytes of shared memory that a block may have. `variant`: an id, or kDefaultVariant.
Status make_plan(const CanonicalProblem& problem, int shared_limit, int variant, Plan& plan);
Status make_backward_plan(const CanonicalGradients& gradients, int shared_limit, int variant, Plan& plan);

// Refuses a plan with a step that no CUDA launch, or not this device, takes.
Status check_steps(const Plan& plan, int shared_limit);

// Points the plan's parameters into `workspace` of plan.workspace_nbytes.
void bind_workspace(Plan& plan, void* workspace);

// Blocks of one head, over all of the batch: as locate_block of segment.h counts them.
inline int64_t blocks_of_head(const Params& p, int seqlen, int rows) {
  return p.cu_seqlens_q.data ? seqlen / rows + p.batch + 2 : divide_up(seqlen, rows) * p.batch;
}

}  // namespace foveal::cuda
