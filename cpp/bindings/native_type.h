// Python types written against CPython's C API, for methods whose work costs less than pybind11's dispatch
// (docs/queues.md has the measurement). Everything that is not hot goes through pybind11 as elsewhere.
//
// A method is `PyObject* body(Self& self, Call call)`. It refuses by `fail`, which sets the Python exception and throws
// PythonError; the slot that CPython calls (`method<Self, body>`, or `guarded` around a slot function) catches that.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "bindings/gil.h"

namespace foveal {

// A Python exception that is set already, on its way out of C++.
struct PythonError {};

// As PyErr_Format.
template <class... Values>
[[noreturn]] void fail(PyObject* type, const char* format, Values... values) {
  PyErr_Format(type, format, values...);
  throw PythonError{};
}

// The new reference that CPython returned, unless it returned an error.
inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw PythonError{};
  return object;
}

// What `body` returns, or `error` with the Python exception set. Other exceptions pass: a thread that waits for the GIL
// when the interpreter has ended is unwound by one that must not be caught.
template <class Result, class Body>
Result guarded(Result error, Body&& body) {
  try {
    return body();
  } catch (const PythonError&) {
  } catch (pybind11::error_already_set& raised) {
    raised.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& raised) {
    PyErr_SetString(PyExc_RuntimeError, raised.what());
  }
  return error;
}

// The same for a function that pybind11 binds: what `body` returns, or the exception in pybind11's form.
template <class Body>
auto guarded_call(Body&& body) {
  try {
    return body();
  } catch (const PythonError&) {
    throw pybind11::error_already_set();
  }
}

// The arguments of a call as CPython passes them (METH_FASTCALL | METH_KEYWORDS).
struct Call {
  PyObject* const* arguments;
  Py_ssize_t count;
  PyObject* keywords;
};

// The parameters of a function: `required` must be given, those from `positional` on by keyword only.
template <size_t kCount>
struct Signature {
  const char* function;  // "IndexedHeap.push"
  std::array<const char*, kCount> names;
  size_t required = kCount;
  size_t positional = kCount;
};

void bind_slowly(const char* function, const char* const* names, size_t count, size_t required, size_t positional,
                 Call call, PyObject** bound);

// The argument of each parameter, borrowed; null for one that was not given.
template <size_t kCount>
std::array<PyObject*, kCount> bind(const Signature<kCount>& signature, Call call) {
  std::array<PyObject*, kCount> bound{};
  if (call.keywords == nullptr && call.count == static_cast<Py_ssize_t>(kCount) && signature.positional == kCount) {
    for (size_t i = 0; i < kCount; ++i) bound[i] = call.arguments[i];
  } else {
    bind_slowly(signature.function, signature.names.data(), kCount, signature.required, signature.positional, call,
                bound.data());
  }
  return bound;
}

// The same for tp_new and tp_init, which get a tuple and a dict.
template <size_t kCount>
std::array<PyObject*, kCount> bind(const Signature<kCount>& signature, PyObject* tuple, PyObject* dict) {
  constexpr Py_ssize_t kMost = static_cast<Py_ssize_t>(kCount);
  const Py_ssize_t given = PyTuple_GET_SIZE(tuple);
  const Py_ssize_t named = dict == nullptr ? 0 : PyDict_GET_SIZE(dict);
  if (given + named > kMost) {
    fail(PyExc_TypeError, "%s: %zd arguments given, expected at most %zd", signature.function, given + named, kMost);
  }
  PyObject* arguments[kCount + 1];
  for (Py_ssize_t i = 0; i < given; ++i) arguments[i] = PyTuple_GET_ITEM(tuple, i);
  if (named == 0) return bind(signature, {arguments, given, nullptr});
  const auto keywords = pybind11::reinterpret_steal<pybind11::object>(checked(PyTuple_New(named)));
  Py_ssize_t place = 0;
  PyObject *name, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &place, &name, &value); ++i) {
    PyTuple_SET_ITEM(keywords.ptr(), i, Py_NewRef(name));
    arguments[given + i] = value;
  }
  return bind(signature, {arguments, given, keywords.ptr()});
}

inline void no_arguments(const char* function, Call call) {
  if (call.count != 0 || (call.keywords != nullptr && PyTuple_GET_SIZE(call.keywords) != 0)) {
    fail(PyExc_TypeError, "%s: arguments given, expected none", function);
  }
}

// ---- numbers --------------------------------------------------------------------------------------------------------

int64_t to_int64_slowly(const char* function, const char* name, PyObject* object);
double to_number_slowly(const char* function, const char* name, PyObject* object);

// An int, or what has __index__; one beyond int64 becomes the nearest, which is out of every range.
inline int64_t to_int64(const char* function, const char* name, PyObject* object) {
  if (PyLong_CheckExact(object)) {
    int overflow;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow == 0) return value;
  }
  return to_int64_slowly(function, name, object);
}

// What float() makes of it, save of strings.
double to_double(const char* function, const char* name, PyObject* object);

// Priorities and weights are float64. An integer is one of them or refused: rounded to its neighbour it would be out of
// order without a word. Other numbers (Decimal, Fraction) become the nearest, as float() has it.
constexpr double kAllIntegers = 9007199254740992;  // 2**53: up to here float64 holds every integer

// Whether `object` is an integer other than `value`, which was made of it.
bool was_rounded(PyObject* object, double value);

[[noreturn]] void refuse_rounded(const char* function, const char* name, PyObject* object);

// A number to be ordered: what to_double makes of it, save of an integer that would be rounded. Not NaN.
inline double to_number(const char* function, const char* name, PyObject* object) {
  const double value =
      PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : to_number_slowly(function, name, object);
  if (value != value) fail(PyExc_ValueError, "%s: %s is nan, expected a number", function, name);
  return value;
}

bool to_bool(const char* function, const char* name, PyObject* object);

// An integer of 1 to `most`.
int64_t to_capacity(const char* function, PyObject* object, int64_t most);

// ---- results --------------------------------------------------------------------------------------------------------

// (first, second); takes the references over.
inline PyObject* pair_of(PyObject* first, PyObject* second) {
  PyObject* pair = first != nullptr && second != nullptr ? PyTuple_New(2) : nullptr;
  if (pair == nullptr) {
    Py_XDECREF(first);
    Py_XDECREF(second);
    throw PythonError{};
  }
  PyTuple_SET_ITEM(pair, 0, first);
  PyTuple_SET_ITEM(pair, 1, second);
  return pair;
}

// ---- the GIL --------------------------------------------------------------------------------------------------------

// Runs `body` without the GIL when `work` elements make it worth the switch: to get it back can take another thread's
// whole time slice.
template <class Body>
void without_gil(size_t work, Body&& body) {
  constexpr size_t kWorthwhile = 128;
  if (work < kWorthwhile) return body();
  const ReleasedGil released;
  body();
}

// ---- types ----------------------------------------------------------------------------------------------------------

template <class Self, auto kBody>
PyObject* method(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* keywords) {
  return guarded<PyObject*>(nullptr,
                            [&] { return kBody(*reinterpret_cast<Self*>(self), Call{arguments, count, keywords}); });
}

// An entry of a method table. `doc` begins with the signature as inspect reads it: "push($self, id, priority)\n--\n\n".
template <class Self, auto kBody>
PyMethodDef method_entry(const char* name, const char* doc, int flags = 0) {
  auto* function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&method<Self, kBody>));
  return {name, function, METH_FASTCALL | METH_KEYWORDS | flags, doc};
}

template <class Function>
PyType_Slot slot(int number, Function* function) {
  return {number, reinterpret_cast<void*>(function)};
}

// as_float and as_number, for Python.
void bind_numbers(pybind11::module_& module);

// Makes the type and puts it into the module under the last part of the spec's name.
PyTypeObject* add_type(pybind11::module_& module, PyType_Spec& spec);

}  // namespace foveal
