// From a kernel and its parameters to a stream; the only place that calls the CUDA runtime's launch functions.
// tests/cpp/cuda_emulation/cuda/launch.h runs the same kernels on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/params.h"

namespace foveal::cuda {

using Kernel = void (*)(Params);
using Error = cudaError_t;
constexpr Error kSuccess = cudaSuccess;

inline const char* error_text(Error error) { return cudaGetErrorString(error); }

inline Error device_count(int* count) { return cudaGetDeviceCount(count); }

// The most dynamic shared memory that a block of this device can be given.
inline Error shared_memory_limit(int device, int* nbytes) {
  return cudaDeviceGetAttribute(nbytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Makes `device` current for a scope and restores the caller's.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  Error error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  Error error_ = cudaSuccess;
};

// Enqueues on `stream` of the current device; neither waits nor allocates.
inline Error launch(Kernel kernel, int64_t num_blocks, int num_threads, int shared_nbytes, void* stream,
                    Params params) {
  const auto function = reinterpret_cast<const void*>(kernel);
  if (shared_nbytes > 48 * 1024) {  // more must be asked for, per function and device
    const Error error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_nbytes);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {&params};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(num_blocks)), dim3(static_cast<unsigned>(num_threads)),
                          arguments, static_cast<size_t>(shared_nbytes), static_cast<cudaStream_t>(stream));
}

}  // namespace foveal::cuda
