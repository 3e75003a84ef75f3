// foveal._core.PriorityMap: the native half of foveal.PriorityMap.
#pragma once

#include <pybind11/pybind11.h>

namespace foveal {

void bind_priority_map(pybind11::module_& module);

}  // namespace foveal
