// Compares foveal's own declarations of torch's C shim with the official headers of the torch that is installed.
// Compiling this file is the test; it is neither linked nor run.
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "bindings/torch_shim.h"

#define FOVEAL_COMPARE(result, name, parameters)                                                  \
  static_assert(std::is_same_v<decltype(&::name), decltype(foveal::torch_shim::Functions::name)>, \
                #name " is declared differently in torch's headers");

FOVEAL_TORCH_REQUIRED(FOVEAL_COMPARE)
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
FOVEAL_TORCH_OPTIONAL(FOVEAL_COMPARE)
#endif

static_assert(std::is_same_v<::StableIValue, foveal::torch_shim::StableIValue>);
static_assert(foveal::torch_shim::kConventionVersion == TORCH_VERSION_2_10_0);
