// foveal._core.SumTree: the native half of foveal.SumTree.
#pragma once

#include <pybind11/pybind11.h>

namespace foveal {

void bind_sum_tree(pybind11::module_& module);

}  // namespace foveal
