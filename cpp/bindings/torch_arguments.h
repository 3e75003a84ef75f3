// The words that torch's dispatcher hands a kernel -> tensors, numbers, and the AttentionProblem they describe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>

#include "bindings/torch_shim.h"
#include "foveal/attention.h"

namespace foveal::torch_shim {

extern Functions torch;  // filled once by register_torch_ops

// What the last kernel on this thread failed with.
extern thread_local Status last_failure;

// Ends the kernel: its entry in torch_ops.cc reports the Status.
[[noreturn]] void fail(Status status);

// Throws std::runtime_error when a call of the shim failed.
void require(int32_t shim_result, const char* what);

// Reads torch's numbers for dtypes and for the CPU, once: they are no part of its ABI.
void read_codes();

class Tensor {  // an owned handle, or none
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) torch.aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Only strided CPU tensors come here: the dispatcher sends every other kind to another key.
TensorView view_of(const char* name, const Tensor& tensor);

// An absent view for no tensor.
TensorView optional_view(const char* name, const Tensor& tensor);

// A new contiguous tensor, and its view.
Tensor allocate(DType dtype, const int64_t* shape, int rank, TensorView& view);

// Takes the arguments off the stack in the schema's order. Nothing here throws, so that a kernel owns every tensor
// before its first check.
class ArgumentReader {
 public:
  explicit ArgumentReader(const StableIValue* stack) : next_(stack) {}

  Tensor tensor() { return Tensor(reinterpret_cast<AtenTensorHandle>(*next_++)); }
  Tensor optional_tensor() {
    const std::optional<StableIValue> value = optional();
    return value ? Tensor(reinterpret_cast<AtenTensorHandle>(*value)) : Tensor();
  }
  bool boolean() { return (*next_++ & 0xff) != 0; }
  int64_t integer() { return static_cast<int64_t>(*next_++); }
  double real() { return real_of(*next_++); }
  std::optional<double> optional_real() {
    const std::optional<StableIValue> value = optional();
    return value ? std::optional(real_of(*value)) : std::nullopt;
  }
  std::optional<int64_t> optional_integer() {
    const std::optional<StableIValue> value = optional();
    return value ? std::optional(static_cast<int64_t>(*value)) : std::nullopt;
  }

 private:
  std::optional<StableIValue> optional() {
    auto* cell = reinterpret_cast<StableIValue*>(*next_++);
    if (cell == nullptr) return std::nullopt;
    const StableIValue value = *cell;
    if (torch.torch_delete_stable_ivalue != nullptr) {
      torch.torch_delete_stable_ivalue(cell);
    } else {
      delete cell;
    }
    return value;
  }
  static double real_of(StableIValue bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  const StableIValue* next_;
};

// What every op but `attention_plain` has. Each op reads its own arguments in its schema's order.
struct ProblemArguments {
  Tensor q, k, v, mask, bias, alibi_slopes, sinks, gate_tau, gate_temperature, span, u, q_lens, kv_lens, q_offsets,
      seed;
  bool causal = false;
  std::optional<int64_t> q_offset, window_left, window_right;
  std::optional<double> scale;
  double span_ramp = 0.0, softcap = 0.0, dropout_p = 0.0;
  int64_t normalizer = 0;  // place in kNormalizerNames
  bool bshd = false;

  void read_qkv(ArgumentReader& read) {
    q = read.tensor();
    k = read.tensor();
    v = read.tensor();
  }
  void read_arrays(ArgumentReader& read) {
    mask = read.optional_tensor();
    bias = read.optional_tensor();
    alibi_slopes = read.optional_tensor();
    sinks = read.optional_tensor();
    gate_tau = read.optional_tensor();
    gate_temperature = read.optional_tensor();
    span = read.optional_tensor();
  }
  void read_dense_arrays(ArgumentReader& read) {
    u = read.optional_tensor();
    q_lens = read.optional_tensor();
    kv_lens = read.optional_tensor();
  }
  void read_numbers(ArgumentReader& read) {
    q_offsets = read.optional_tensor();
    seed = read.optional_tensor();
    span_ramp = read.real();
    causal = read.boolean();
    q_offset = read.optional_integer();
    window_left = read.optional_integer();
    window_right = read.optional_integer();
    scale = read.optional_real();
    softcap = read.real();
    dropout_p = read.real();
    normalizer = read.integer();
  }
  void read_all(ArgumentReader& read) {
    read_qkv(read);
    read_arrays(read);
    read_dense_arrays(read);
    read_numbers(read);
    bshd = read.boolean();
  }
};

// Borrows from `arguments`. Without values, k stands in their place, for its shape.
AttentionProblem problem_of(ProblemArguments& arguments, bool with_values = true);

}  // namespace foveal::torch_shim
