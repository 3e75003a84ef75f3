// From a canonical AttentionProblem to what will be launched: path, kernel, grid, splits, workspace. Host only, no
// CUDA: the whole decision can be tested on a machine without a GPU.
//
//   kEmpty    no query row: nothing is launched
//   kPlain    float32, float64, strides or extents that 16-byte loads cannot take, `weights`
//   kForward  16-bit elements, many query rows
//   kDecode   16-bit elements, at most kDecodeRows query rows per key/value head: keys are split, then merged
//
// Nothing here depends on the batch size or the number of heads except grid and workspace sizes, so neither do a row's
// bits.
#pragma once

#include <cstdint>

#include "cuda/params.h"
#include "foveal/attention.h"

namespace foveal::cuda {

enum class Path : uint8_t { kEmpty, kPlain, kForward, kDecode };

constexpr int kDefaultVariant = -1;
constexpr int kMaxHeadDim = 256;
constexpr int kDecodeRows = 64;

struct Plan {
  Path path = Path::kEmpty;
  int variant = kDefaultVariant;  // id in kernel_list.h
  DType dtype = DType::kFloat32;
  int64_t num_blocks = 0;
  int num_threads = 0;
  int shared_nbytes = 0;
  int64_t combine_blocks = 0;  // > 0: a second launch merges the splits
  int64_t workspace_nbytes = 0;
  Params params;  // all but the workspace pointers
};

// `shared_limit`: bytes of shared memory that a block may have. `variant`: an id, or kDefaultVariant.
Status make_plan(const AttentionProblem& problem, int shared_limit, int variant, Plan& plan);

// Points the plan's partial results into `workspace` of plan.workspace_nbytes.
void bind_workspace(Plan& plan, void* workspace);

}  // namespace foveal::cuda
