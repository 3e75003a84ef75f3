// The part of libtorch's stable C shim that foveal calls, declared here and looked up at run time, so that one binary,
// built without torch, serves every torch from 2.10 on.
//
// Source: torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h. The opaque handles have upstream's
// names, so that tests/cpp/torch_abi_check.cc can compare each signature below with the official headers.
//
// Contract of the shim: an int32_t result is 0 on success; sizes and strides are borrowed from the tensor; a tensor
// handle that a call returns is owned by the caller.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <vector>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;

namespace foveal::torch_shim {

// One argument or result of an op. A Tensor is an owned handle, a bool the low byte, a float the bits of a double; an
// optional is 0 or the address of an owned heap cell that holds the value.
using StableIValue = uint64_t;

// Arguments come in stack[0..num_arguments), results go to stack[0..num_results). The arguments' owner is the callee.
using BoxedKernel = void (*)(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

// The calling convention that the ops are written for: torch 2.10.
constexpr uint64_t kConventionVersion = 0x020a000000000000;

// X(result, name, parameters)
#define FOVEAL_TORCH_REQUIRED(X)                                                                       \
  X(int32_t, aoti_torch_library_init_impl,                                                             \
    (const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryHandle*))           \
  X(int32_t, torch_library_impl,                                                                       \
    (TorchLibraryHandle, const char* name, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t version)) \
  X(int32_t, aoti_torch_delete_tensor_object, (AtenTensorHandle))                                      \
  X(int32_t, aoti_torch_get_dim, (AtenTensorHandle, int64_t*))                                         \
  X(int32_t, aoti_torch_get_sizes, (AtenTensorHandle, int64_t**))                                      \
  X(int32_t, aoti_torch_get_strides, (AtenTensorHandle, int64_t**))                                    \
  X(int32_t, aoti_torch_get_dtype, (AtenTensorHandle, int32_t*))                                       \
  X(int32_t, torch_get_const_data_ptr, (AtenTensorHandle, const void**))                               \
  X(int32_t, torch_get_mutable_data_ptr, (AtenTensorHandle, void**))                                   \
  X(int32_t, aoti_torch_empty_strided,                                                                 \
    (int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,   \
     int32_t device_index, AtenTensorHandle*))                                                         \
  X(int32_t, torch_get_num_threads, (uint32_t*))                                                       \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                           \
  X(int32_t, aoti_torch_dtype_float32, ())                                                             \
  X(int32_t, aoti_torch_dtype_float64, ())                                                             \
  X(int32_t, aoti_torch_dtype_float16, ())                                                             \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                            \
  X(int32_t, aoti_torch_dtype_bool, ())                                                                \
  X(int32_t, aoti_torch_dtype_int8, ())                                                                \
  X(int32_t, aoti_torch_dtype_int32, ())                                                               \
  X(int32_t, aoti_torch_dtype_int64, ())

// Null where torch is too old to have it.
#define FOVEAL_TORCH_OPTIONAL(X) X(int32_t, torch_delete_stable_ivalue, (uint64_t*)) /* from 2.13 */

struct Functions {
#define FOVEAL_DECLARE(result, name, parameters) result(*name) parameters = nullptr;
  FOVEAL_TORCH_REQUIRED(FOVEAL_DECLARE)
  FOVEAL_TORCH_OPTIONAL(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE
};

// Fills `functions` from the first of `libraries` that this process has loaded already; torch loads its libraries
// privately, so that a search of the global scope would miss them. Returns "" or what is missing.
inline std::string find_functions(const std::vector<std::string>& libraries, Functions& functions) {
  void* library = nullptr;
  for (const std::string& path : libraries) {
    if (library == nullptr) library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  }
  if (library == nullptr) return "libtorch_cpu";
#define FOVEAL_FIND(result, name, parameters) \
  functions.name = reinterpret_cast<result(*) parameters>(dlsym(library, #name));
  FOVEAL_TORCH_REQUIRED(FOVEAL_FIND)
  FOVEAL_TORCH_OPTIONAL(FOVEAL_FIND)
#undef FOVEAL_FIND
#define FOVEAL_REQUIRE(result, name, parameters) \
  if (functions.name == nullptr) return #name;
  FOVEAL_TORCH_REQUIRED(FOVEAL_REQUIRE)
#undef FOVEAL_REQUIRE
  return "";
}

}  // namespace foveal::torch_shim
