// From a CanonicalProblem to what kernels read, and what a kernel may not be given. Host only, no CUDA.
#pragma once

#include <string>

#include "cuda/params.h"
#include "foveal/attention.h"

namespace foveal::cuda {

// What is beyond the backend as a whole, whichever path a problem takes: extents, and whatever is not at its default
// without being named as supported in operands.cc.
Status check_supported(const CanonicalProblem& problem);
Status check_supported(const CanonicalGradients& gradients);

// All but the workspace.
Params params_of(const CanonicalProblem& problem);
void add_gradients(const CanonicalGradients& gradients, Params& params);

// Rows that begin 16-byte aligned and lie dense, so that cp.async can fetch 8 elements at a time.
bool loads_in_chunks(const TensorView& view);

Status refuse(ErrorKind kind, const std::string& text);

}  // namespace foveal::cuda
