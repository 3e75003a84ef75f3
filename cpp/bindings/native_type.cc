#include "bindings/native_type.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

namespace py = pybind11;

namespace foveal {
void bind_slowly(const char* function, const char* const* names, size_t count, size_t required, size_t positional,
                 Call call, PyObject** bound) {
  const auto given = static_cast<size_t>(call.count);
  if (given > positional) {
    fail(PyExc_TypeError, "%s: %zd positional arguments given, expected at most %zu", function, call.count, positional);
  }
  std::copy_n(call.arguments, given, bound);
  const Py_ssize_t named = call.keywords == nullptr ? 0 : PyTuple_GET_SIZE(call.keywords);
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(call.keywords, i);
    size_t place = 0;
    while (place < count && PyUnicode_CompareWithASCIIString(name, names[place]) != 0) ++place;
    if (place == count) fail(PyExc_TypeError, "%s: there is no parameter %R", function, name);
    if (bound[place] != nullptr) fail(PyExc_TypeError, "%s: %s is given twice", function, names[place]);
    bound[place] = call.arguments[call.count + i];
  }
  for (size_t i = 0; i < required; ++i) {
    if (bound[i] == nullptr) fail(PyExc_TypeError, "%s: %s is missing", function, names[i]);
  }
}

int64_t to_int64_slowly(const char* function, const char* name, PyObject* object) {
  if (!PyIndex_Check(object)) {
    fail(PyExc_TypeError, "%s: %s has type %s, expected an integer", function, name, Py_TYPE(object)->tp_name);
  }
  const auto integer = py::reinterpret_steal<py::object>(checked(PyNumber_Index(object)));
  int overflow;
  const long long value = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  return overflow == 0 ? value : overflow > 0 ? INT64_MAX : INT64_MIN;
}

bool was_rounded(PyObject* object, double value) {
  if (PyFloat_Check(object) || !PyIndex_Check(object) || !std::isfinite(value)) return false;
  // Not PyNumber_Index: it refuses arrays of one integer, which older NumPys convert, and tensors of one float.
  const auto integer = py::reinterpret_steal<py::object>(asking_for_gil([&] { return PyNumber_Long(object); }));
  const auto rounded = py::reinterpret_steal<py::object>(PyFloat_FromDouble(value));
  if (!integer || !rounded) throw PythonError{};
  const int equal = PyObject_RichCompareBool(rounded.ptr(), integer.ptr(), Py_EQ);
  if (equal < 0) throw PythonError{};
  return equal == 0;
}

void refuse_rounded(const char* function, const char* name, PyObject* object) {
  fail(PyExc_ValueError,
       "%s: %s is %S, expected a float, or an integer that float64 can hold (all up to 2**53, not all beyond)",
       function, name, object);
}

double to_double(const char* function, const char* name, PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  const PyNumberMethods* number = Py_TYPE(object)->tp_as_number;
  if (!PyFloat_Check(object) && (number == nullptr || (number->nb_float == nullptr && number->nb_index == nullptr))) {
    const char* type = Py_TYPE(object)->tp_name;
    if (const char* dot = std::strrchr(type, '.')) type = dot + 1;
    fail(PyExc_TypeError, "%s: %s has type %s, expected a real number", function, name, type);
  }
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    if (PyLong_Check(object)) fail(PyExc_OverflowError, "%s: %s is beyond float64", function, name);
    throw PythonError{};
  }
  return value;
}

double to_number_slowly(const char* function, const char* name, PyObject* object) {
  const double value = to_double(function, name, object);
  if (std::abs(value) >= kAllIntegers && was_rounded(object, value)) refuse_rounded(function, name, object);
  return value;
}

bool to_bool(const char* function, const char* name, PyObject* object) {
  if (!PyBool_Check(object)) fail(PyExc_TypeError, "%s: %s is %R, expected a bool", function, name, object);
  return object == Py_True;
}

int64_t to_capacity(const char* function, PyObject* object, int64_t most) {
  const int64_t capacity = to_int64(function, "capacity", object);
  if (capacity < 1 || capacity > most) {
    fail(PyExc_ValueError, "%s: capacity is %S, expected 1 to %lld", function, object, static_cast<long long>(most));
  }
  return capacity;
}

void bind_numbers(py::module_& module) {
  module.def(
      "as_float",
      [](const char* function, const char* name, py::handle value) {
        return guarded_call([&] { return to_double(function, name, value.ptr()); });
      },
      py::arg("function"), py::arg("name"), py::arg("value"), py::pos_only(),
      "What float() makes of it, save of strings. The first two are for the error.");
  module.def(
      "as_number",
      [](const char* function, const char* name, py::handle value) {
        return guarded_call([&] { return to_number(function, name, value.ptr()); });
      },
      py::arg("function"), py::arg("name"), py::arg("value"), py::pos_only(),
      "The same of a number that is to be ordered: ValueError for NaN and for an integer that would be rounded.");
}

PyTypeObject* add_type(py::module_& module, PyType_Spec& spec) {
  PyObject* type = PyType_FromModuleAndSpec(module.ptr(), &spec, nullptr);
  if (type == nullptr) throw py::error_already_set();
  const std::string name = spec.name;
  module.attr(name.substr(name.rfind('.') + 1).c_str()) = py::handle(type);
  return reinterpret_cast<PyTypeObject*>(type);  // keeps a reference of its own
}

}  // namespace foveal
