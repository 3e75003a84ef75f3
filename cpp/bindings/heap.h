// IndexedHeap as a Python type.
#pragma once

#include <pybind11/pybind11.h>

namespace foveal {

// foveal.Empty, borrowed: what pop and its like raise.
PyObject* empty_error();

void bind_heap(pybind11::module_& module);

}  // namespace foveal
