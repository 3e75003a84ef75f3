#include <algorithm>
#include <cstring>

#include "cuda/foveal_cuda.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace foveal::cuda {
namespace {

void write_text(const char* reason, char* text, uint64_t text_nbytes) {
  if (text == nullptr || text_nbytes == 0) return;
  const size_t length = std::min<size_t>(std::strlen(reason), text_nbytes - 1);
  std::memcpy(text, reason, length);
  text[length] = 0;
}

int32_t report(const Launch& launch, const Status& status) {
  write_text(status.message().c_str(), launch.text, launch.text_nbytes);
  return static_cast<int32_t>(status.kind);
}

int32_t report(Error error, char* text, uint64_t text_nbytes) {
  if (error == kSuccess) return 0;
  write_text(error_text(error), text, text_nbytes);
  return kCudaErrorBase + static_cast<int32_t>(error);
}

Status wrong_size(const char* what, uint64_t found, uint64_t expected) {
  return {ErrorKind::kValue, "the " + std::string(what) + " has " + std::to_string(found) +
                                 " bytes, the CUDA library expects " + std::to_string(expected)};
}

// The one way from a caller's launch to a plan: judged, canonical, forward or backward. `limit_of(device, &limit)`
// tells the shared memory that a block may have there.
template <class LimitOf>
int32_t plan_launch(const Launch& launch, Plan& plan, int& device, const LimitOf& limit_of) {
  if (launch.problem_nbytes != sizeof(AttentionProblem)) {
    return report(launch, wrong_size("problem", launch.problem_nbytes, sizeof(AttentionProblem)));
  }
  if (launch.gradients != nullptr && launch.gradients_nbytes != sizeof(AttentionGradients)) {
    return report(launch, wrong_size("record of gradients", launch.gradients_nbytes, sizeof(AttentionGradients)));
  }
  const auto& given = *static_cast<const AttentionProblem*>(launch.problem);
  device = given.q.device.index;
  if (given.q.device.type != DeviceType::kCuda) {
    return report(launch, {ErrorKind::kType, "q is on cpu, expected a CUDA device"});
  }
  const auto plan_canonical = [&](const Status& status, const auto& make) {
    if (!status.ok()) return report(launch, status);
    int limit = 0;
    const Error error = limit_of(device, &limit);
    return error == kSuccess ? report(launch, make(limit)) : report(error, launch.text, launch.text_nbytes);
  };
  Status status;
  if (launch.gradients == nullptr) {
    const CanonicalProblem problem = canonicalize(given, status);
    return plan_canonical(status, [&](int limit) { return make_plan(problem, limit, launch.variant, plan); });
  }
  const CanonicalGradients gradients =
      canonicalize(given, *static_cast<const AttentionGradients*>(launch.gradients), status);
  return plan_canonical(status, [&](int limit) { return make_backward_plan(gradients, limit, launch.variant, plan); });
}

}  // namespace
}  // namespace foveal::cuda

using namespace foveal::cuda;

int32_t foveal_cuda_device_count(int32_t* count, char* text, uint64_t text_nbytes) {
  *count = 0;
  return report(device_count(count), text, text_nbytes);
}

int32_t foveal_cuda_attention_plan(const Launch* launch, int32_t shared_limit, int64_t out[24]) {
  Plan plan;
  int device = 0;
  const auto given = [shared_limit](int, int* limit) {
    *limit = shared_limit;
    return kSuccess;
  };
  if (const int32_t status = plan_launch(*launch, plan, device, given); status != 0) return status;
  static_assert(4 + 4 * kMaxSteps == 24);
  *out++ = static_cast<int64_t>(plan.path);
  *out++ = plan.params.num_splits;
  *out++ = plan.workspace_nbytes;
  *out++ = plan.num_steps;
  for (const Step& step : plan.steps) {
    for (const int64_t value :
         {int64_t{step.kernel}, step.num_blocks, int64_t{step.num_threads}, int64_t{step.shared_nbytes}}) {
      *out++ = value;
    }
  }
  return 0;
}

int32_t foveal_cuda_attention_workspace(const Launch* launch, uint64_t* nbytes) {
  Plan plan;
  int device = 0;
  if (const int32_t status = plan_launch(*launch, plan, device, shared_memory_limit); status != 0) return status;
  *nbytes = static_cast<uint64_t>(plan.workspace_nbytes);
  return 0;
}

int32_t foveal_cuda_attention(const Launch* launch) {
  Plan plan;
  int device = 0;
  if (const int32_t status = plan_launch(*launch, plan, device, shared_memory_limit); status != 0) return status;
  if (plan.num_steps == 0) return 0;
  if (launch->workspace_nbytes < static_cast<uint64_t>(plan.workspace_nbytes)) {
    return report(*launch,
                  {foveal::ErrorKind::kMemory, "the workspace has " + std::to_string(launch->workspace_nbytes) +
                                                   " bytes, expected " + std::to_string(plan.workspace_nbytes)});
  }
  bind_workspace(plan, launch->workspace);

  const DeviceScope scope(device);
  Error error = scope.error();
  for (int i = 0; i < plan.num_steps && error == kSuccess; ++i) {
    const Step& step = plan.steps[i];
    error = foveal::cuda::launch(find_kernel(step.kernel, plan.dtype), step.num_blocks, step.num_threads,
                                 step.shared_nbytes, launch->stream, plan.params);
  }
  return report(error, launch->text, launch->text_nbytes);
}
