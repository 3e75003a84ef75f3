#include "bindings/array_in_out.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstring>
#include <string_view>
#include <utility>

#include "attention/rejection.h"

namespace py = pybind11;

namespace foveal {
namespace {

// ---- NumPy ----------------------------------------------------------------------------------------------------------
// Arrays are read through pybind11's description of NumPy's structs: py::array costs a reference count and an attribute
// look-up for what is a load here, and a call on tiny arrays has no time for that.

using NumpyApi = py::detail::npy_api;

// NumPy's type numbers, which its ABI fixes, from bool to uint64; then its floating types.
constexpr std::pair<ElementCode, int> kNumpyIntegers[] = {
    {ElementCode::kBool, 1},
    {ElementCode::kInt, 1},
    {ElementCode::kUInt, 1},
    {ElementCode::kInt, 2},
    {ElementCode::kUInt, 2},
    {ElementCode::kInt, 4},
    {ElementCode::kUInt, 4},
    {ElementCode::kInt, sizeof(long)},
    {ElementCode::kUInt, sizeof(long)},
    {ElementCode::kInt, 8},
    {ElementCode::kUInt, 8},
};
constexpr int kNumpyFloat = 11, kNumpyDouble = 12, kNumpyHalf = 23, kNumpyUserTypes = 256;
constexpr int kNumpyInt64 = sizeof(long) == 8 ? 7 : 9;

bool is_numpy_array(py::handle object) { return NumpyApi::get().PyArray_Check_(object.ptr()); }

// ml_dtypes registers bfloat16 with NumPy under a number that differs from run to run; its scalar type has a name.
bool is_bfloat16(const py::detail::PyArrayDescr_Proxy* dtype) {
  if (dtype->type_num < kNumpyUserTypes || dtype->kind != 'V') return false;
  const char* name = reinterpret_cast<const PyTypeObject*>(dtype->typeobj)->tp_name;
  const char* dot = std::strrchr(name, '.');
  return std::strcmp(dot != nullptr ? dot + 1 : name, "bfloat16") == 0;
}

void set_element(const py::detail::PyArrayDescr_Proxy* dtype, BorrowedArray& borrowed) {
  const int number = dtype->type_num;
  if (number == kNumpyFloat) {
    borrowed.set_element(ElementCode::kFloat, 32);
  } else if (number == kNumpyDouble) {
    borrowed.set_element(ElementCode::kFloat, 64);
  } else if (number == kNumpyHalf) {
    borrowed.set_element(ElementCode::kFloat, 16);
  } else if (number >= 0 && number < static_cast<int>(std::size(kNumpyIntegers))) {
    const auto [code, nbytes] = kNumpyIntegers[number];
    borrowed.set_element(code, static_cast<uint8_t>(nbytes * CHAR_BIT));
  } else if (is_bfloat16(dtype)) {
    borrowed.set_element(ElementCode::kBFloat, 16);
  }
}

// A masked array would lose its mask without a word.
void refuse_masked_array(const char* name, py::handle array) {
  if (py::isinstance(array, py::module_::import("numpy.ma").attr("MaskedArray"))) {
    const std::string plain =
        std::strcmp(name, "mask") == 0 ? "mask.filled(False)" : "np.ma.getdata(" + std::string(name) + ")";
    reject_type(std::string(name) + " has type " + type_text(array) + ", expected a plain numpy.ndarray, such as " +
                plain + " (only `mask` hides keys)");
  }
}

// The call that makes an array which we read.
std::string native(const char* name, DType dtype) {
  return std::string("np.ascontiguousarray(") + name + ", dtype='" + name_of(dtype) + "')";
}

[[noreturn]] void reject_byte_order(const char* name, DType dtype) {
  constexpr char kForeign = std::endian::native == std::endian::little ? '>' : '<';
  reject_value(std::string(name) + " has byte order '" + kForeign + "', expected the native one, as in " +
               native(name, dtype));
}

BorrowedArray borrow_numpy(const char* name, py::handle array) {
  if (Py_TYPE(array.ptr()) != NumpyApi::get().PyArray_Type_) refuse_masked_array(name, array);
  const auto* proxy = py::detail::array_proxy(array.ptr());
  const auto* dtype = py::detail::array_descriptor_proxy(proxy->descr);
  BorrowedArray borrowed;
  set_element(dtype, borrowed);
  borrowed.writable = (proxy->flags & NumpyApi::NPY_ARRAY_WRITEABLE_) != 0;
  TensorView& view = borrowed.view;
  view.data = proxy->data;
  view.rank = proxy->nd;
  if (borrowed.code == ElementCode::kOther) return borrowed;
  // '=' and '|' are native, and so may be the mark of our own order.
  borrowed.swapped = dtype->byteorder == (std::endian::native == std::endian::little ? '>' : '<');
  const int64_t nbytes = borrowed.bits / CHAR_BIT;
  for (int axis = 0; axis < std::min(proxy->nd, kMaxRank); ++axis) {
    view.shape[axis] = proxy->dimensions[axis];
    view.stride[axis] = proxy->strides[axis] / nbytes;
    if (proxy->strides[axis] % nbytes != 0 && proxy->dimensions[axis] > 1) {
      reject_value(std::string(name) + ".strides[" + std::to_string(axis) + "] is " +
                   std::to_string(proxy->strides[axis]) + ", expected a multiple of the item size " +
                   std::to_string(nbytes) + ", as in np.ascontiguousarray(" + name + ")");
    }
  }
  return borrowed;
}

// ---- integers -------------------------------------------------------------------------------------------------------
// A number beyond int64 becomes the nearest int64, which is out of every range that is checked later.

template <class T>
int64_t load(const std::byte* place) {
  T value;
  std::memcpy(&value, place, sizeof value);  // may be misaligned
  if constexpr (std::is_same_v<T, uint64_t>) value = std::min<uint64_t>(value, INT64_MAX);
  return static_cast<int64_t>(value);
}

int64_t load_integer(const BorrowedArray& array, int64_t index) {
  const auto* place = static_cast<const std::byte*>(array.view.data) + index * (array.bits / CHAR_BIT);
  const bool is_signed = array.code == ElementCode::kInt;
  switch (array.bits) {
    case 8:
      return is_signed ? load<int8_t>(place) : load<uint8_t>(place);
    case 16:
      return is_signed ? load<int16_t>(place) : load<uint16_t>(place);
    case 32:
      return is_signed ? load<int32_t>(place) : load<uint32_t>(place);
    default:
      return is_signed ? load<int64_t>(place) : load<uint64_t>(place);
  }
}

int64_t to_int64(const char* name, py::handle value) {
  const py::object integer = integer_of(value);
  if (!integer) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    reject_type(std::string(name) + " holds a " + type_text(value) + ", expected integers");
  }
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  return overflow == 0 ? result : overflow > 0 ? INT64_MAX : INT64_MIN;
}

// ---- kinds ----------------------------------------------------------------------------------------------------------

// Where the type of an object was defined; "" when somebody made that anything but a name.
std::string module_of(py::handle object) {
  const py::object module = py::type::handle_of(object).attr("__module__");
  return py::isinstance<py::str>(module) ? module.cast<std::string>() : "";
}

// "jaxlib._jax" and "jaxlib.foo" are both jaxlib.
std::string library_of(py::handle array) {
  const std::string module = module_of(array);
  return module.substr(0, module.find('.'));
}

std::string dtype_text(py::handle array) {
  return py::hasattr(array, "dtype") ? py::str(array.attr("dtype")).cast<std::string>() : "unknown";
}

BorrowedArray borrow_integers(const char* name, py::handle values) {
  BorrowedArray array = is_numpy_array(values) ? borrow_numpy(name, values) : borrow_dlpack(name, values);
  if (array.code != ElementCode::kInt && array.code != ElementCode::kUInt) {
    reject_type(std::string(name) + " has dtype " + dtype_text(values) + ", expected integers");
  }
  if (array.bits != 8 && array.bits != 16 && array.bits != 32 && array.bits != 64) {
    reject_type(std::string(name) + " has " + std::to_string(array.bits) +
                "-bit integers, expected those of 8, 16, 32 or 64 bits");
  }
  if (array.swapped) reject_byte_order(name, DType::kInt64);
  return array;
}

// The function that makes an array of the caller's kind of anything that speaks DLPack.
py::object from_dlpack_of(py::handle array) {
  if (py::hasattr(array, "__array_namespace__")) return array.attr("__array_namespace__")().attr("from_dlpack");
  return py::module_::import(library_of(array).c_str()).attr("from_dlpack");
}

}  // namespace

py::object integer_of(py::handle value) {
  const std::string_view type = Py_TYPE(value.ptr())->tp_name;
  if (PyBool_Check(value.ptr()) || type == "numpy.bool" || type == "numpy.bool_" || !PyIndex_Check(value.ptr())) {
    return {};
  }
  return py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
}

std::string type_text(py::handle object) {
  const std::string module = module_of(object);
  const auto name = py::type::handle_of(object).attr("__qualname__").cast<std::string>();
  return module.empty() || module == "builtins" ? name : module + "." + name;
}

CallArrays::CallArrays(py::handle q) : q_(q), numpy_(is_numpy_array(q)) {
  if (!numpy_ && !py::hasattr(q, "__dlpack__")) {
    reject_type("q has type " + type_text(q) + ", expected numpy.ndarray, torch.Tensor or an array with __dlpack__");
  }
}

BorrowedArray CallArrays::borrow(const char* name, py::handle array) const {
  if (numpy_ && is_numpy_array(array)) return borrow_numpy(name, array);
  const bool same_kind =
      !numpy_ && py::hasattr(array, "__dlpack__") && !is_numpy_array(array) && library_of(array) == library_of(q_);
  if (!same_kind)
    reject_type(std::string(name) + " has type " + type_text(array) + ", expected " + type_text(q_) + " (from q)");
  return borrow_dlpack(name, array);
}

TensorView CallArrays::view(const char* name, py::handle array, Elements elements, Access access) {
  BorrowedArray borrowed = borrow(name, array);
  // Elements of a kind that `canonicalize` refuses anyway had better be refused for that.
  if (borrowed.swapped && borrowed.readable && is_floating(borrowed.view.dtype) && elements == Elements::kFloating) {
    reject_byte_order(name, borrowed.view.dtype);
  }
  if (!borrowed.readable) {
    const std::string expected = elements == Elements::kBool ? "bool" : "float32, float64, float16 or bfloat16";
    const std::string dtype = dtype_text(array);
    const DType readable = elements == Elements::kBool ? DType::kBool : DType::kFloat32;
    const std::string hint = dtype == "object" ? ", as in " + native(name, readable) : "";
    reject_type(std::string(name) + " has dtype " + dtype + ", expected " + expected + hint);
  }
  if (access == Access::kWrite && !borrowed.writable) {
    reject_value(std::string(name) + " is read-only, expected an array that may be written");
  }
  if (borrowed.lease) leases_.push_back(std::move(borrowed.lease));
  return borrowed.view;
}

TensorView CallArrays::integers(const char* name, py::handle values, int64_t batch) {
  if (values.is_none()) return {};
  const auto keep = [this](int64_t count, int rank, auto value_of) {
    integers_.push_back(std::make_unique<int64_t[]>(static_cast<size_t>(count)));
    int64_t* kept = integers_.back().get();
    for (int64_t i = 0; i < count; ++i) kept[i] = value_of(i);
    return contiguous_view(kept, DType::kInt64, &count, rank);
  };
  PyObject* object = values.ptr();
  if (PyList_Check(object) || PyTuple_Check(object)) {
    // A tuple of its own: an item's __index__ may change a list.
    const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(object));
    if (!items) throw py::error_already_set();
    return keep(static_cast<int64_t>(items.size()), 1,
                [&](int64_t i) { return to_int64(name, items[static_cast<size_t>(i)]); });
  }
  if (!is_numpy_array(values) && !py::hasattr(values, "__dlpack__")) {
    return keep(1, 0, [&](int64_t) { return to_int64(name, values); });
  }
  const BorrowedArray array = borrow_integers(name, values);
  TensorView view = array.view;
  if (view.rank > 1 || (view.rank == 1 && batch != kAnyCount && view.shape[0] != batch)) {
    view.data = nullptr;  // for `canonicalize` to refuse, unread
    view.dtype = DType::kInt64;
    return view;
  }
  return keep(view.rank == 0 ? 1 : view.shape[0], view.rank,
              [&](int64_t i) { return load_integer(array, view.rank == 0 ? 0 : i * view.stride[0]); });
}

TensorView CallArrays::numbers(const char* name, py::handle values) {
  if (is_numpy_array(values) || py::hasattr(values, "__dlpack__")) return view(name, values, Elements::kFloating);
  const double number = PyFloat_AsDouble(values.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
    PyErr_Clear();
    reject_type(std::string(name) + " has type " + type_text(values) + ", expected a number or a floating array");
  }
  numbers_.push_back(std::make_unique<double>(number));
  return contiguous_view(numbers_.back().get(), DType::kFloat64, nullptr, 0);
}

TensorView CallArrays::table(const char* name, py::handle values, int64_t batch) {
  if (values.is_none()) return {};
  if (!is_numpy_array(values) && !py::hasattr(values, "__dlpack__")) {
    reject_type(std::string(name) + " has type " + type_text(values) + ", expected a 2-D array of integers");
  }
  const BorrowedArray array = borrow_integers(name, values);
  TensorView view = array.view;
  if (view.rank != 2 || view.shape[0] != batch) {
    view.data = nullptr;  // for `canonicalize` to refuse, unread
    view.dtype = DType::kInt64;
    return view;
  }
  const int64_t count = view.shape[0] * view.shape[1], columns = view.shape[1];
  integers_.push_back(std::make_unique<int64_t[]>(static_cast<size_t>(count)));
  int64_t* kept = integers_.back().get();
  for (int64_t i = 0; i < count; ++i)
    kept[i] = load_integer(array, i / columns * view.stride[0] + i % columns * view.stride[1]);
  return contiguous_view(kept, DType::kInt64, view.shape, 2);
}

py::object CallArrays::allocate(DType dtype, const int64_t* shape, int rank, TensorView& view) const {
  if (!numpy_) {
    HostArray array(dtype, shape, rank);
    view = array.view();
    return py::cast(std::move(array));
  }
  const NumpyApi& numpy = NumpyApi::get();
  PyObject* descr;  // NewFromDescr takes the reference over
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kInt64) {
    descr = numpy.PyArray_DescrFromType_(dtype == DType::kFloat32   ? kNumpyFloat
                                         : dtype == DType::kFloat64 ? kNumpyDouble
                                                                    : kNumpyInt64);
  } else {
    descr = py::reinterpret_borrow<py::object>(py::detail::array_proxy(q_.ptr())->descr).release().ptr();
  }
  static_assert(sizeof(Py_intptr_t) == sizeof(int64_t));
  const auto* dimensions = reinterpret_cast<const Py_intptr_t*>(shape);
  auto array = py::reinterpret_steal<py::object>(
      numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, descr, rank, dimensions, nullptr, nullptr, 0, nullptr));
  if (!array) throw py::error_already_set();
  view = contiguous_view(py::detail::array_proxy(array.ptr())->data, dtype, shape, rank);
  return array;
}

py::object CallArrays::hand_over(py::object result) const {
  return numpy_ ? std::move(result) : from_dlpack_of(q_)(result);
}

}  // namespace foveal
