// The extension module foveal._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "attention/threads.h"
#include "bench/machine_limits.h"
#include "bindings/attention.h"
#include "bindings/dlpack.h"
#include "bindings/errors.h"
#include "bindings/gil.h"
#include "bindings/heap.h"
#include "bindings/native_type.h"
#include "bindings/priority_map.h"
#include "bindings/sum_tree.h"
#include "bindings/torch_ops.h"
#include "isa/detect.h"

namespace py = pybind11;

namespace {

int get_num_threads() {
  foveal::Status status;
  const int count = foveal::num_threads(0, status);
  foveal::throw_if_failed(status);
  return count;
}

std::string isa() {
  foveal::Status status;
  const foveal::KernelTable* table = foveal::active_table(status);
  foveal::throw_if_failed(status);
  return foveal::table_name(table);
}

void use_isa(const std::optional<std::string>& name) {
  foveal::Status status;
  const foveal::KernelTable* table = name ? foveal::require_table(*name, "use_isa: name", status) : nullptr;
  foveal::throw_if_failed(status);
  foveal::use_table(table);
}

void read_bytes(int threads, const py::buffer& buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  {
    const foveal::ReleasedGil released;
    foveal::read_bytes(threads, view.buf, view.len);
  }
  PyBuffer_Release(&view);
}

// Types and exceptions stand in static variables, once for the process, as NumPy's do. And before Python 3.12 pybind11
// itself waits for ever for a subinterpreter's GIL, in PyGILState_Ensure, so that this must come before all of it.
bool in_main_interpreter() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return true;
  PyErr_SetString(PyExc_ImportError,
                  "foveal: imported in a subinterpreter, expected the main interpreter of the process");
  return false;
}

}  // namespace

PYBIND11_MODULE(_core_of_main_interpreter, m, py::mod_gil_not_used(), py::multiple_interpreters::not_supported()) {
  // Python 3.13 calls PyInit in the main interpreter, and this in the one that imports.
  if (!in_main_interpreter()) throw py::error_already_set();
  m.doc() = "The native half of foveal. Private: what is public is in the package itself.";
  foveal::bind_attention(m);
  foveal::bind_dlpack(m);
  foveal::bind_numbers(m);
  foveal::bind_heap(m);
  foveal::bind_priority_map(m);
  foveal::bind_sum_tree(m);
  foveal::bind_torch_ops(m);
  m.def("set_num_threads", &foveal::set_num_threads, py::arg("count"), py::pos_only(),
        "0 goes back to the environment.");
  m.def("get_num_threads", &get_num_threads);
  m.def("isa", &isa, "The instruction set whose kernels run. ValueError for an unknown or unavailable FOVEAL_ISA.");
  m.def("isas", &foveal::available_isas, "The instruction sets of this build that this machine can run, best first.");
  m.def("use_isa", &use_isa, py::arg("name"), py::pos_only(),
        "Run the kernels of this instruction set from now on; None goes back to FOVEAL_ISA or the best. For tests.");
  m.def("run_fmas", &foveal::run_fmas, py::arg("threads"), py::arg("operations"), py::pos_only(),
        py::call_guard<foveal::ReleasedGil>(),
        "About so many float32 operations as FMAs in registers, and nothing else; returns how many it were.");
  m.def("read_bytes", &read_bytes, py::arg("threads"), py::arg("buffer"), py::pos_only(),
        "Load every byte of a contiguous buffer once, front to back.");
}

extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  return in_main_interpreter() ? PyInit__core_of_main_interpreter() : nullptr;
}
