// The kernels of torch.ops.foveal.* on the CPU; their schemas and rules are in python/foveal/torch/_ops.py.
#pragma once

#include <pybind11/pybind11.h>

namespace foveal {

// Adds to the module:
//   register_torch_ops(libraries)   gives the ops their CPU kernels through torch's stable C shim
//   take_torch_failure(message)     the exception that the kernel which failed on this thread meant, if any
void bind_torch_ops(pybind11::module_& module);

}  // namespace foveal
