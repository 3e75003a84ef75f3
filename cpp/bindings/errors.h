// A Status as the Python exception that it means.
#pragma once

#include <pybind11/pybind11.h>

#include "foveal/attention.h"

namespace foveal {

inline PyObject* exception_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kType:
      return PyExc_TypeError;
    case ErrorKind::kValue:
      return PyExc_ValueError;
    case ErrorKind::kNotImplemented:
      return PyExc_NotImplementedError;
    case ErrorKind::kMemory:
      return PyExc_MemoryError;
    case ErrorKind::kInterrupted:
      return PyExc_KeyboardInterrupt;
    case ErrorKind::kForked:
    case ErrorKind::kNone:
      break;
  }
  return PyExc_RuntimeError;
}

inline void set_error(const Status& status) { PyErr_SetString(exception_class(status.kind), status.message().c_str()); }

// Throws error_already_set unless `status` is ok. An exception that is set already, as after an interrupt, goes on.
inline void throw_if_failed(const Status& status) {
  if (status.ok()) return;
  if (PyErr_Occurred() == nullptr) set_error(status);
  throw pybind11::error_already_set();
}

}  // namespace foveal
