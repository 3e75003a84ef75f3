// A borrowed n-dimensional array: pointer, dtype, device, shape and strides in elements.
//
// The one description of an array that crosses every boundary of foveal: bindings make it from NumPy, DLPack or torch,
// validation reads it, kernels index with it. It owns nothing.
#pragma once

#include <cstdint>

namespace foveal {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kInt8, kInt32, kInt64 };

enum class DeviceType : uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;

  bool operator==(const Device&) const = default;
};

constexpr int kMaxRank = 8;

//   element (i0, i1, ...) is at  data + (i0*stride[0] + i1*stride[1] + ...) * itemsize
//   strides may be negative or zero (broadcast); `data` may be null when an extent is zero
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int32_t rank = -1;  // -1: the optional argument was not given
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  bool present() const { return rank >= 0; }
};

constexpr int64_t itemsize(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kBool:
    case DType::kInt8:
      return 1;
  }
  return 0;
}

constexpr bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

const char* name_of(DType dtype);

}  // namespace foveal
