#include "bindings/batch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "bindings/gil.h"
#include "bindings/native_type.h"

namespace py = pybind11;

namespace foveal {
namespace {

std::string dtype_text(const py::array& array) { return py::str(array.dtype()).cast<std::string>(); }

py::object call(const py::object& function, py::handle argument) {
  PyObject* result = asking_for_gil([&] { return PyObject_CallOneArg(function.ptr(), argument.ptr()); });
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The array itself, or a view of the tensor. Lists, tuples and ranges are copied.
py::array to_numpy(const char* function, const char* name, py::handle object) {
  if (py::isinstance<py::array>(object)) {
    auto array = py::reinterpret_borrow<py::array>(object);
    // A masked array would lose its mask without a word.
    if (Py_TYPE(object.ptr()) != py::detail::npy_api::get().PyArray_Type_ && py::hasattr(object, "mask")) {
      fail(PyExc_TypeError, "%s: %s is a masked array, expected a plain numpy.ndarray", function, name);
    }
    return array;
  }
  const py::module_ numpy = py::module_::import("numpy");
  if (py::hasattr(object, "__dlpack__")) {
    try {
      // torch exports a tensor that it is still to negate as if that were done.
      const py::object settled = py::getattr(object, "resolve_neg", py::none());
      const py::object tensor = settled.is_none() ? py::reinterpret_borrow<py::object>(object) : settled();
      return call(numpy.attr("from_dlpack"), tensor).cast<py::array>();
    } catch (py::error_already_set& error) {  // not on the CPU, not a dtype of NumPy's, requires grad
      if (!error.matches(PyExc_Exception)) throw;
      const std::string text =
          std::string(function) + ": " + name + " cannot be read: " + py::str(error.value()).cast<std::string>();
      py::raise_from(error, PyExc_TypeError, text.c_str());
      throw PythonError{};
    }
  }
  if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr()) && !PyRange_Check(object.ptr())) {
    fail(PyExc_TypeError, "%s: %s has type %s, expected an array, a tensor or a list", function, name,
         Py_TYPE(object.ptr())->tp_name);
  }
  try {
    return call(numpy.attr("asarray"), object).cast<py::array>();
  } catch (py::error_already_set& error) {  // lists of different lengths, or whatever an element raises
    if (!error.matches(PyExc_Exception)) throw;
    const std::string text = std::string(function) + ": " + name + " is no array";
    py::raise_from(error, PyExc_ValueError, text.c_str());
    throw PythonError{};
  }
}

void check_shape(const char* function, const char* name, const py::array& array, const char* expected) {
  if (array.ndim() != 1) {
    const py::str shape(array.attr("shape"));
    fail(PyExc_ValueError, "%s: %s has shape %S, expected %s", function, name, shape.ptr(), expected);
  }
}

[[noreturn]] void refuse_dtype(const char* function, const char* name, const py::array& array, const char* expected) {
  fail(PyExc_TypeError, "%s: %s has dtype %s, expected %s", function, name, dtype_text(array).c_str(), expected);
}

void check_byte_order(const char* function, const char* name, const py::array& array) {
  if (array.dtype().byteorder() == (std::endian::native == std::endian::little ? '>' : '<')) {
    fail(PyExc_ValueError, "%s: %s has dtype %s, expected the native byte order", function, name,
         dtype_text(array).c_str());
  }
}

// Any stride, aligned or not.
template <class From, class To>
Batch<To> copy(const py::array& array) {
  Batch<To> batch{std::make_unique_for_overwrite<To[]>(static_cast<size_t>(array.size())),
                  static_cast<size_t>(array.size())};
  const auto* place = static_cast<const char*>(array.data());
  const py::ssize_t stride = array.size() > 0 ? array.strides(0) : 0;
  for (size_t i = 0; i < batch.count; ++i) {
    From value;
    std::memcpy(&value, place + static_cast<py::ssize_t>(i) * stride, sizeof value);
    batch.values[i] = static_cast<To>(value);
  }
  return batch;
}

// The first integer of an array that float64 cannot hold, or how many there are.
template <class Integer>
py::ssize_t first_beyond_float64(const py::array& array) {
  const Batch<Integer> integers = copy<Integer, Integer>(array);
  for (size_t i = 0; i < integers.count; ++i) {
    const auto bits = static_cast<uint64_t>(integers[i]);
    const uint64_t magnitude = integers[i] < 0 ? 0 - bits : bits;
    if (magnitude <= static_cast<uint64_t>(kAllIntegers)) continue;
    if (std::bit_width(magnitude >> std::countr_zero(magnitude)) > 53) return static_cast<py::ssize_t>(i);
  }
  return array.size();
}

template <class T>
PyObject* new_array(std::span<const T> values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data()).release().ptr();
}

}  // namespace

Batch<int64_t> read_ids(const char* function, const char* name, py::handle ids, int64_t capacity) {
  const py::array array = to_numpy(function, name, ids);
  check_shape(function, name, array, "(n,)");
  const char kind = array.dtype().kind();
  const bool empty_list = array.size() == 0 && !py::isinstance<py::array>(ids) && !py::hasattr(ids, "__dlpack__");
  if (kind != 'i' || array.itemsize() < 4) {
    if (empty_list) return {};
    refuse_dtype(function, name, array, "int32 or int64");
  }
  check_byte_order(function, name, array);
  Batch<int64_t> batch = array.itemsize() == 4 ? copy<int32_t, int64_t>(array) : copy<int64_t, int64_t>(array);
  uint64_t largest = 0;  // a negative id is a large one
  for (size_t i = 0; i < batch.count; ++i) largest = std::max(largest, static_cast<uint64_t>(batch[i]));
  if (largest >= static_cast<uint64_t>(capacity)) {
    const auto span = batch.span();
    const auto bad = std::find_if(span.begin(), span.end(), [&](int64_t id) { return id < 0 || id >= capacity; });
    fail(PyExc_IndexError, "%s: %s[%zd] is %lld, expected 0 to %lld", function, name,
         static_cast<Py_ssize_t>(bad - span.begin()), static_cast<long long>(*bad),
         static_cast<long long>(capacity - 1));
  }
  return batch;
}

void check_not_rounded(const char* function, const char* name, py::handle source, const py::array& array) {
  if (array.ndim() != 1 || array.itemsize() != 8) return;
  const auto refuse = [&](py::ssize_t i, py::handle integer) {
    refuse_rounded(function, (std::string(name) + "[" + std::to_string(i) + "]").c_str(), integer.ptr());
  };
  const char kind = array.dtype().kind();
  if (kind == 'i' || kind == 'u') {
    const py::ssize_t i = kind == 'i' ? first_beyond_float64<int64_t>(array) : first_beyond_float64<uint64_t>(array);
    if (i < array.size()) refuse(i, array[py::int_(i)]);
  } else if (kind == 'f' && PyTuple_Check(source.ptr()) && PyTuple_GET_SIZE(source.ptr()) == array.size()) {
    const Batch<double> numbers = copy<double, double>(array);
    for (py::ssize_t i = 0; i < array.size(); ++i) {
      PyObject* item = PyTuple_GET_ITEM(source.ptr(), i);
      if (!PyFloat_CheckExact(item) && was_rounded(item, numbers[static_cast<size_t>(i)])) refuse(i, item);
    }
  }
}

Batch<double> read_numbers(const char* function, const char* name, py::handle numbers, size_t count) {
  // A copy of a list, so that what is checked is what was read.
  const auto source = PyList_Check(numbers.ptr()) ? py::reinterpret_steal<py::object>(PyList_AsTuple(numbers.ptr()))
                                                  : py::reinterpret_borrow<py::object>(numbers);
  if (!source) throw PythonError{};
  py::array array = to_numpy(function, name, source);
  const std::string expected = "(" + std::to_string(count) + ",)";
  check_shape(function, name, array, expected.c_str());
  if (static_cast<size_t>(array.size()) != count) {
    fail(PyExc_ValueError, "%s: %s has shape (%zd,), expected %s", function, name, array.size(), expected.c_str());
  }
  const bool list = !py::isinstance<py::array>(numbers) && !py::hasattr(numbers, "__dlpack__");
  if (list) check_not_rounded(function, name, source, array);
  if (list && (array.dtype().kind() == 'i' || array.dtype().kind() == 'u')) {
    array = py::array(call(array.attr("astype"), py::str("float64")));
  }
  if (array.dtype().kind() != 'f' || array.itemsize() < 4 || array.itemsize() > 8) {
    refuse_dtype(function, name, array, "float32 or float64");
  }
  check_byte_order(function, name, array);
  Batch<double> batch = array.itemsize() == 4 ? copy<float, double>(array) : copy<double, double>(array);
  bool nan = false;
  for (size_t i = 0; i < batch.count; ++i) nan |= batch[i] != batch[i];
  if (nan) {
    const auto span = batch.span();
    const auto bad = std::find_if(span.begin(), span.end(), [](double number) { return std::isnan(number); });
    fail(PyExc_ValueError, "%s: %s[%zd] is nan, expected a number", function, name,
         static_cast<Py_ssize_t>(bad - span.begin()));
  }
  return batch;
}

PyObject* to_array(std::span<const int64_t> values) { return new_array(values); }
PyObject* to_array(std::span<const double> values) { return new_array(values); }

}  // namespace foveal
