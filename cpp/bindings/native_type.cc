#include "bindings/native_type.h"

#include <algorithm>
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

double to_double_slowly(const char* function, const char* name, PyObject* object) {
  const PyNumberMethods* number = Py_TYPE(object)->tp_as_number;
  if (!PyFloat_Check(object) && (number == nullptr || (number->nb_float == nullptr && number->nb_index == nullptr))) {
    fail(PyExc_TypeError, "%s: %s has type %s, expected a real number", function, name, Py_TYPE(object)->tp_name);
  }
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    if (PyLong_Check(object)) fail(PyExc_OverflowError, "%s: %s is beyond float64", function, name);
    throw PythonError{};
  }
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

PyTypeObject* add_type(py::module_& module, PyType_Spec& spec) {
  PyObject* type = PyType_FromModuleAndSpec(module.ptr(), &spec, nullptr);
  if (type == nullptr) throw py::error_already_set();
  const std::string name = spec.name;
  module.attr(name.substr(name.rfind('.') + 1).c_str()) = py::handle(type);
  return reinterpret_cast<PyTypeObject*>(type);  // keeps a reference of its own
}

}  // namespace foveal
