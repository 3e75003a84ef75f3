// The arrays of a batch: ids and numbers from NumPy arrays, torch tensors (or whatever speaks DLPack), lists and
// tuples.
//
// They are copied, and checked as they are copied: the caller may change his arrays while the GIL is released, and the
// heap trusts what was checked. That is a pass over memory at a nanosecond an element.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <memory>
#include <span>

namespace foveal {

template <class T>
struct Batch {
  std::unique_ptr<T[]> values;
  size_t count = 0;

  std::span<const T> span() const { return {values.get(), count}; }
  T operator[](size_t i) const { return values[i]; }
};

// (n,) int32 or int64, each in range(capacity): else IndexError. Sets an exception and throws PythonError for a bad
// one.
Batch<int64_t> read_ids(const char* function, const char* name, pybind11::handle ids, int64_t capacity);

// Refuses integers that float64 would round: in an array of them, or in the tuple of numbers of which NumPy made an
// array of float64, as it does of integers beside a float.
void check_not_rounded(const char* function, const char* name, pybind11::handle source, const pybind11::array& array);

// (count,) float32 or float64 without NaN; a list of integers will do.
Batch<double> read_numbers(const char* function, const char* name, pybind11::handle numbers, size_t count);

// A new NumPy array; a new reference.
PyObject* to_array(std::span<const int64_t> values);
PyObject* to_array(std::span<const double> values);

}  // namespace foveal
