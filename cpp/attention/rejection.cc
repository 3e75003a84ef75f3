#include "attention/rejection.h"

#include <algorithm>
#include <cstdio>

namespace foveal {

std::string is_integer(int64_t value) {
  if (value == INT64_MAX) return " is 2^63 - 1 or more";
  if (value == INT64_MIN) return " is -2^63 or less";
  return " is " + std::to_string(value);
}

void reject_type(const std::string& text) { throw Rejection{{ErrorKind::kType, text}}; }

void reject_value(const std::string& text) { throw Rejection{{ErrorKind::kValue, text}}; }

void reject_dtype(const std::string& name, DType found, const std::string& expected) {
  reject_type(name + " has dtype " + name_of(found) + ", expected " + expected);
}

void reject_shape(const std::string& name, const TensorView& view, const std::string& expected) {
  reject_value(name + " has shape " + text_of(view.shape, view.rank) + ", expected " + expected);
}

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string text_of(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string text_of(const int64_t* shape, int rank) {
  std::string text = "(";
  for (int axis = 0; axis < std::min(rank, kMaxRank); ++axis) {
    text += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
  }
  return text + (rank > kMaxRank ? ", ...)" : rank == 1 ? ",)" : ")");
}

std::string dimensions(int rank) { return std::to_string(rank) + (rank == 1 ? " dimension" : " dimensions"); }

std::string extent_found(const std::string& name, int axis, int64_t extent) {
  return name + ".shape[" + std::to_string(axis) + "] is " + std::to_string(extent);
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kBool:
      return "bool";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
  }
  return "unknown";
}

}  // namespace foveal
