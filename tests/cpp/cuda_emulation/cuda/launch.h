// Launches of cpp/cuda/launch.h carried out by the emulated device: in the calling thread, before the call returns.
#pragma once

#include <cstdint>

#include "cuda/params.h"

namespace foveal::cuda {

using Kernel = void (*)(Params);
using Error = int;
constexpr Error kSuccess = 0;

inline const char* error_text(Error) { return "the emulated device does not fail"; }

inline Error device_count(int* count) {
  *count = 1;
  return kSuccess;
}

inline Error shared_memory_limit(int, int* nbytes) {
  *nbytes = 227 * 1024;  // Hopper
  return kSuccess;
}

class DeviceScope {
 public:
  explicit DeviceScope(int) {}
  Error error() const { return kSuccess; }
};

Error launch(Kernel kernel, int64_t num_blocks, int num_threads, int shared_nbytes, void* stream, Params params);

}  // namespace foveal::cuda
