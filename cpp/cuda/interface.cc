// The layout of what crosses the C interface, as text for the other side to compare.
#include <cstddef>
#include <string>
#include <type_traits>

#include "attention/members.h"
#include "cuda/foveal_cuda.h"
#include "cuda/plan.h"

namespace foveal {

template <>
struct Members<cuda::Launch> {
  template <class Visit>
  static constexpr void for_each(Visit& visit) {
    using L = cuda::Launch;
    visit("problem", &L::problem), visit("problem_nbytes", &L::problem_nbytes);
    visit("gradients", &L::gradients), visit("gradients_nbytes", &L::gradients_nbytes);
    visit("variant", &L::variant), visit("stream", &L::stream);
    visit("workspace", &L::workspace), visit("workspace_nbytes", &L::workspace_nbytes);
    visit("text", &L::text), visit("text_nbytes", &L::text_nbytes);
  }
};

static_assert(count_listed_members<cuda::Launch>() == count_members<cuda::Launch>());

namespace cuda {
namespace {

template <class Struct>
void add_struct(std::string& text, const std::string& name) {
  static_assert(std::is_standard_layout_v<Struct>, "crosses a C interface");
  const Struct object = {};
  for_each_member<Struct>([&](const char* member, auto pointer) {
    const auto& value = object.*pointer;
    const auto offset = reinterpret_cast<const std::byte*>(&value) - reinterpret_cast<const std::byte*>(&object);
    text += name + '.' + member + ' ' + std::to_string(offset) + ':' + std::to_string(sizeof value) + '\n';
  });
  text += name + ' ' + std::to_string(sizeof object) + '\n';
}

void add_number(std::string& text, const std::string& name, int64_t number) {
  text += name + ' ' + std::to_string(number) + '\n';
}

std::string interface_text() {
  std::string text;
  add_struct<Device>(text, "Device");
  add_struct<TensorView>(text, "TensorView");
  add_struct<AttentionProblem>(text, "AttentionProblem");
  add_struct<AttentionGradients>(text, "AttentionGradients");
  add_struct<Launch>(text, "Launch");
  for (int code = 0;; ++code) {
    const std::string name = name_of(static_cast<DType>(code));
    if (name == "unknown") break;
    add_number(text, "DType." + name, code);
  }
  add_number(text, "Layout.bshd", static_cast<int>(Layout::kBshd));
  add_number(text, "DeviceType.cuda", static_cast<int>(DeviceType::kCuda));
  add_number(text, "ErrorKind.TypeError", static_cast<int>(ErrorKind::kType));
  add_number(text, "ErrorKind.ValueError", static_cast<int>(ErrorKind::kValue));
  add_number(text, "ErrorKind.NotImplementedError", static_cast<int>(ErrorKind::kNotImplemented));
  add_number(text, "ErrorKind.MemoryError", static_cast<int>(ErrorKind::kMemory));
  add_number(text, "kUnlimited", kUnlimited);
  add_number(text, "kCudaErrorBase", kCudaErrorBase);
  add_number(text, "kMaxRank", kMaxRank);
  add_number(text, "kMaxSteps", kMaxSteps);
  add_number(text, "kDefaultVariant", kDefaultVariant);
  return text;
}

}  // namespace
}  // namespace cuda
}  // namespace foveal

const char* foveal_cuda_interface() {
  static const std::string text = foveal::cuda::interface_text();
  return text.c_str();
}
