// The C interface of the CUDA backend's shared object, which is loaded on first use and needs no GPU to load.
//
// It never allocates device memory, never synchronises, creates no stream: outputs, lse and workspace come from the
// caller, everything is enqueued on the caller's stream, so calls can be captured in a CUDA graph.
//
// Every function returns 0, or a foveal::ErrorKind (1..), or kCudaErrorBase + cudaError_t with the reason in `text`.
#pragma once

#include <cstdint>

namespace foveal::cuda {

constexpr int32_t kCudaErrorBase = 1000;

struct Launch {
  const void* problem = nullptr;    // a foveal::AttentionProblem as the caller gave it, its memory on q's device
  uint64_t problem_nbytes = 0;      // sizeof of the caller's AttentionProblem; must be the library's
  const void* gradients = nullptr;  // backward: a foveal::AttentionGradients, its memory there too
  uint64_t gradients_nbytes = 0;    // sizeof of the caller's AttentionGradients
  int32_t variant = -1;             // a kernel of kernel_list.h; -1: the default
  void* stream = nullptr;           // cudaStream_t
  void* workspace = nullptr;        // device memory, 256-byte aligned, live until the stream has passed
  uint64_t workspace_nbytes = 0;
  char* text = nullptr;  // receives a zero-terminated reason
  uint64_t text_nbytes = 0;
};

}  // namespace foveal::cuda

#if defined(__GNUC__)
#define FOVEAL_CUDA_API extern "C" __attribute__((visibility("default")))
#else
#define FOVEAL_CUDA_API extern "C"
#endif

// What a caller's mirror of these structs must agree with, a line each: "AttentionProblem.scale 2768:8" (offset and
// size), "AttentionProblem 2800" (size), "DType.bool 4", "kUnlimited -1". It differs when caller and library come from
// different trees.
FOVEAL_CUDA_API const char* foveal_cuda_interface();

FOVEAL_CUDA_API int32_t foveal_cuda_device_count(int32_t* count, char* text, uint64_t text_nbytes);

// The forward pass, or the backward pass where the launch has gradients. The first function tells how many bytes of
// workspace the second one needs (0: none) and launches nothing.
FOVEAL_CUDA_API int32_t foveal_cuda_attention_workspace(const foveal::cuda::Launch* launch, uint64_t* nbytes);
FOVEAL_CUDA_API int32_t foveal_cuda_attention(const foveal::cuda::Launch* launch);

// What would be launched, for tests and reports: path, num_splits, workspace_nbytes, num_steps, then for each of up to
// five steps kernel, num_blocks, num_threads, shared_nbytes. Needs no GPU: `shared_limit` stands for the device's
// shared memory per block.
FOVEAL_CUDA_API int32_t foveal_cuda_attention_plan(const foveal::cuda::Launch* launch, int32_t shared_limit,
                                                   int64_t plan[24]);
