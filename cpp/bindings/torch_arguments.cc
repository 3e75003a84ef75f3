#include "bindings/torch_arguments.h"

#include <array>
#include <stdexcept>
#include <string>

#include "attention/rejection.h"
#include "bindings/dlpack.h"

namespace foveal::torch_shim {

Functions torch;

thread_local Status last_failure;

void fail(Status status) { throw Rejection{std::move(status)}; }

void require(int32_t shim_result, const char* what) {
  if (shim_result != 0) throw std::runtime_error(std::string("torch failed to ") + what);
}

namespace {

constexpr std::array kDTypes = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16,
                                DType::kBool,    DType::kInt8,    DType::kInt32,   DType::kInt64};

// torch's numbers for kDTypes and for the CPU.
std::array<int32_t, kDTypes.size()> dtype_codes;
int32_t cpu_device = 0;

}  // namespace

void read_codes() {
  dtype_codes = {torch.aoti_torch_dtype_float32(),  torch.aoti_torch_dtype_float64(), torch.aoti_torch_dtype_float16(),
                 torch.aoti_torch_dtype_bfloat16(), torch.aoti_torch_dtype_bool(),    torch.aoti_torch_dtype_int8(),
                 torch.aoti_torch_dtype_int32(),    torch.aoti_torch_dtype_int64()};
  cpu_device = torch.aoti_torch_device_type_cpu();
}

TensorView view_of(const char* name, const Tensor& tensor) {
  TensorView view;
  int64_t rank = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t code = 0;
  const void* data = nullptr;
  require(torch.aoti_torch_get_dim(tensor.get(), &rank), "give a rank");
  require(torch.aoti_torch_get_sizes(tensor.get(), &sizes), "give sizes");
  require(torch.aoti_torch_get_strides(tensor.get(), &strides), "give strides");
  require(torch.aoti_torch_get_dtype(tensor.get(), &code), "give a dtype");
  require(torch.torch_get_const_data_ptr(tensor.get(), &data),
          "give a pointer");  // leaves a copy-on-write tensor shared
  const auto known = std::find(dtype_codes.begin(), dtype_codes.end(), code);
  if (known == dtype_codes.end()) throw std::runtime_error(std::string("no kernel reads the dtype of ") + name);
  view.dtype = kDTypes[static_cast<size_t>(known - dtype_codes.begin())];
  view.data = const_cast<void*>(data);
  view.rank = static_cast<int32_t>(rank);
  std::copy_n(sizes, std::min<int64_t>(rank, kMaxRank), view.shape);
  std::copy_n(strides, std::min<int64_t>(rank, kMaxRank), view.stride);
  return view;
}

TensorView optional_view(const char* name, const Tensor& tensor) {
  return tensor ? view_of(name, tensor) : TensorView{};
}

Tensor allocate(DType dtype, const int64_t* shape, int rank, TensorView& view) {
  view = contiguous_view(nullptr, dtype, shape, rank);
  const auto index = static_cast<size_t>(std::find(kDTypes.begin(), kDTypes.end(), dtype) - kDTypes.begin());
  AtenTensorHandle handle = nullptr;
  if (torch.aoti_torch_empty_strided(rank, shape, view.stride, dtype_codes[index], cpu_device, 0, &handle) != 0) {
    fail({ErrorKind::kMemory, "out of memory"});
  }
  Tensor tensor(handle);
  require(torch.torch_get_mutable_data_ptr(handle, &view.data), "give a pointer");
  return tensor;
}

namespace {

// None is unlimited, so the core's own sign for that is no number to accept.
int64_t window_side(const char* name, std::optional<int64_t> width) {
  if (width.value_or(0) < 0) {
    fail({ErrorKind::kValue, std::string(name) + " is " + std::to_string(*width) + ", expected None or at least 0"});
  }
  return width.value_or(kUnlimited);
}

uint64_t seed_of(const Tensor& tensor, double dropout_p) {
  if (!tensor) {
    if (dropout_p != 0.0) fail({ErrorKind::kValue, "seed is absent, expected one with dropout_p"});
    return 0;
  }
  const TensorView seed = view_of("seed", tensor);
  if (seed.rank != 0 || seed.dtype != DType::kInt64)
    fail({ErrorKind::kType, "seed is no int64 tensor of shape (), as the op expects it"});
  const int64_t number = *static_cast<const int64_t*>(seed.data);
  if (number < 0) fail({ErrorKind::kValue, "seed is " + std::to_string(number) + ", expected 0 to 2^63 - 1"});
  return static_cast<uint64_t>(number);
}

}  // namespace

AttentionProblem problem_of(ProblemArguments& arguments, bool with_values) {
  AttentionProblem problem;
  problem.q = view_of("q", arguments.q);
  problem.k = view_of("k", arguments.k);
  problem.v = with_values ? view_of("v", arguments.v) : problem.k;
  problem.mask = optional_view("mask", arguments.mask);
  problem.bias = optional_view("bias", arguments.bias);
  problem.alibi_slopes = optional_view("alibi_slopes", arguments.alibi_slopes);
  problem.sinks = optional_view("sinks", arguments.sinks);
  problem.gate_tau = optional_view("gate[0]", arguments.gate_tau);
  problem.gate_temperature = optional_view("gate[1]", arguments.gate_temperature);
  problem.span = optional_view("span[0]", arguments.span);
  problem.additive = optional_view("u", arguments.u);
  problem.span_ramp = arguments.span_ramp;
  problem.q_lens = optional_view("q_lens", arguments.q_lens);
  problem.kv_lens = optional_view("kv_lens", arguments.kv_lens);
  problem.q_offset = optional_view("q_offset", arguments.q_offsets);
  if (arguments.q_offset) {
    problem.q_offset.data = &*arguments.q_offset;
    problem.q_offset.dtype = DType::kInt64;
    problem.q_offset.rank = 0;
  }
  problem.layout = arguments.bshd ? Layout::kBshd : Layout::kBhsd;
  problem.causal = arguments.causal;
  problem.window_left = window_side("window[0]", arguments.window_left);
  problem.window_right = window_side("window[1]", arguments.window_right);
  problem.has_scale = arguments.scale.has_value();
  problem.scale = arguments.scale.value_or(0.0);
  problem.softcap = arguments.softcap;
  if (arguments.normalizer < 0 || arguments.normalizer >= kNormalizers)
    fail({ErrorKind::kValue, "normalizer is " + std::to_string(arguments.normalizer) + ", expected 0 to " +
                                 std::to_string(kNormalizers - 1)});
  problem.normalizer = static_cast<Normalizer>(arguments.normalizer);
  problem.dropout_p = arguments.dropout_p;
  problem.seed = seed_of(arguments.seed, arguments.dropout_p);
  return problem;
}

}  // namespace foveal::torch_shim
