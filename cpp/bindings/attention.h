#pragma once

#include <pybind11/pybind11.h>

namespace foveal {

// _core.attention and _core.attention_reference.
void bind_attention(pybind11::module_& module);

}  // namespace foveal
