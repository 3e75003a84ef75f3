#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/foveal_cuda.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace foveal::cuda {
namespace {

static_assert(std::is_standard_layout_v<AttentionProblem>, "crosses a C interface");

void write_text(const char* reason, char* text, uint64_t text_nbytes) {
  if (text == nullptr || text_nbytes == 0) return;
  const size_t length = std::min<size_t>(std::strlen(reason), text_nbytes - 1);
  std::memcpy(text, reason, length);
  text[length] = 0;
}

int32_t report(const Launch& launch, const Status& status) {
  write_text(status.text.c_str(), launch.text, launch.text_nbytes);
  return static_cast<int32_t>(status.kind);
}

int32_t report(Error error, char* text, uint64_t text_nbytes) {
  if (error == kSuccess) return 0;
  write_text(error_text(error), text, text_nbytes);
  return kCudaErrorBase + static_cast<int32_t>(error);
}

Status canonical_problem(const Launch& launch, AttentionProblem& problem) {
  if (launch.problem_nbytes != sizeof(AttentionProblem)) {
    return {ErrorKind::kValue, "attention: the problem has " + std::to_string(launch.problem_nbytes) +
                                   " bytes, the CUDA library expects " + std::to_string(sizeof(AttentionProblem))};
  }
  problem = *static_cast<const AttentionProblem*>(launch.problem);
  if (problem.q.device.type != DeviceType::kCuda)
    return {ErrorKind::kType, "attention: q is on cpu, expected a CUDA device"};
  return canonicalize(problem);
}

// The one way from a caller's launch to a plan: judged, canonical, and for the device that holds q.
int32_t plan_for_device(const Launch& launch, AttentionProblem& problem, Plan& plan) {
  if (const Status status = canonical_problem(launch, problem); !status.ok()) return report(launch, status);
  int shared_limit = 0;
  if (const Error error = shared_memory_limit(problem.q.device.index, &shared_limit); error != kSuccess) {
    return report(error, launch.text, launch.text_nbytes);
  }
  return report(launch, make_plan(problem, shared_limit, launch.variant, plan));
}

}  // namespace
}  // namespace foveal::cuda

using namespace foveal::cuda;

uint64_t foveal_cuda_problem_nbytes() { return sizeof(foveal::AttentionProblem); }

int32_t foveal_cuda_device_count(int32_t* count, char* text, uint64_t text_nbytes) {
  *count = 0;
  return report(device_count(count), text, text_nbytes);
}

int32_t foveal_cuda_attention_plan(const Launch* launch, int32_t shared_limit, int64_t out[6]) {
  foveal::AttentionProblem problem;
  Plan plan;
  foveal::Status status = canonical_problem(*launch, problem);
  if (status.ok()) status = make_plan(problem, shared_limit, launch->variant, plan);
  if (!status.ok()) return report(*launch, status);
  const int64_t values[6] = {
      static_cast<int64_t>(plan.path), plan.variant, plan.num_blocks, plan.num_threads, plan.shared_nbytes,
      plan.params.num_splits};
  std::copy(values, values + 6, out);
  return 0;
}

int32_t foveal_cuda_attention_workspace(const Launch* launch, uint64_t* nbytes) {
  foveal::AttentionProblem problem;
  Plan plan;
  if (const int32_t status = plan_for_device(*launch, problem, plan); status != 0) return status;
  *nbytes = static_cast<uint64_t>(plan.workspace_nbytes);
  return 0;
}

int32_t foveal_cuda_attention_forward(const Launch* launch) {
  foveal::AttentionProblem problem;
  Plan plan;
  if (const int32_t status = plan_for_device(*launch, problem, plan); status != 0) return status;
  if (plan.path == Path::kEmpty) return 0;
  if (launch->workspace_nbytes < static_cast<uint64_t>(plan.workspace_nbytes)) {
    return report(*launch, {foveal::ErrorKind::kMemory,
                            "attention: the workspace has " + std::to_string(launch->workspace_nbytes) +
                                " bytes, expected " + std::to_string(plan.workspace_nbytes)});
  }
  bind_workspace(plan, launch->workspace);

  const DeviceScope scope(problem.q.device.index);
  if (scope.error() != kSuccess) return report(scope.error(), launch->text, launch->text_nbytes);
  Error error = foveal::cuda::launch(find_kernel(plan.variant, plan.dtype), plan.num_blocks, plan.num_threads,
                                     plan.shared_nbytes, launch->stream, plan.params);
  if (error == kSuccess && plan.combine_blocks > 0) {
    error = foveal::cuda::launch(combine_kernel(plan.dtype), plan.combine_blocks, kCombineRows * 32, 0, launch->stream,
                                 plan.params);
  }
  return report(error, launch->text, launch->text_nbytes);
}
