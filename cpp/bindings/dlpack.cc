#include "bindings/dlpack.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>

#include "attention/rejection.h"

namespace py = pybind11;

namespace foveal {
namespace {

// ---- the ABI, as dlpack.h of the standard lays it out -------------------------------------------------------------

struct DLDevice {
  int32_t type;
  int32_t id;
};
constexpr int32_t kDLCpu = 1, kDLCudaHost = 3;  // device types that the CPU reads

struct DLDataType {
  ElementCode code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {  // capsule "dltensor"
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {  // capsule "dltensor_versioned", from 1.0
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};
constexpr uint64_t kReadOnly = 1, kIsCopied = 2;

template <class Managed>
constexpr const char* kCapsuleName = nullptr;
template <>
constexpr const char* kCapsuleName<DLManagedTensor> = "dltensor";
template <>
constexpr const char* kCapsuleName<DLManagedTensorVersioned> = "dltensor_versioned";

// ---- elements -------------------------------------------------------------------------------------------------------

struct Element {
  ElementCode code;
  uint8_t bits;
  DType dtype;
};
constexpr Element kElements[] = {
    {ElementCode::kFloat, 32, DType::kFloat32}, {ElementCode::kFloat, 64, DType::kFloat64},
    {ElementCode::kFloat, 16, DType::kFloat16}, {ElementCode::kBFloat, 16, DType::kBFloat16},
    {ElementCode::kBool, 8, DType::kBool},      {ElementCode::kInt, 8, DType::kInt8},
    {ElementCode::kInt, 32, DType::kInt32},     {ElementCode::kInt, 64, DType::kInt64},
};

DLDataType element_of(DType dtype) {
  for (const Element& element : kElements) {
    if (element.dtype == dtype) return {element.code, element.bits, 1};
  }
  return {ElementCode::kOther, 0, 1};
}

// ---- borrowing ------------------------------------------------------------------------------------------------------

void require_cpu(const char* name, DLDevice device) {
  if (device.type == kDLCpu || device.type == kDLCudaHost) return;
  reject_type(std::string(name) + " is on DLPack device type " + std::to_string(device.type) + ", expected the CPU");
}

DLDevice device_of(const char* name, py::handle array) {
  if (!py::hasattr(array, "__dlpack_device__")) {
    reject_type(std::string(name) + " has __dlpack__ alone, expected __dlpack_device__ beside it");
  }
  const py::object device = array.attr("__dlpack_device__")();
  try {
    const auto [type, id] = device.cast<std::pair<int32_t, int32_t>>();
    return {type, id};
  } catch (const py::cast_error&) {
    reject_type(std::string(name) + ".__dlpack_device__() gave " + py::repr(device).cast<std::string>() +
                ", expected (device type, device id)");
  }
}

py::object export_capsule(py::handle array) {
  const py::object method = array.attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(1, 1));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a lender from before 1.0 does not know the keyword
    return method();
  }
}

// A lender's word is checked as far as it can be: what it says about its memory must be taken on trust.
void read(const char* name, const DLTensor& tensor, BorrowedArray& borrowed) {
  require_cpu(name, tensor.device);
  if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) {
    reject_value(std::string(name) + " has " + dimensions(tensor.ndim) +
                 (tensor.ndim < 0 ? ", expected at least 0" : " and no shape, expected one"));
  }
  TensorView& view = borrowed.view;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.ndim;
  int64_t contiguous = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] < 0) {
      reject_value(extent_found(name, axis, tensor.shape[axis]) + ", expected at least 0");
    }
    if (axis < kMaxRank) {
      view.shape[axis] = tensor.shape[axis];
      view.stride[axis] = tensor.strides != nullptr ? tensor.strides[axis] : contiguous;
    }
    // An array whose strides overflow cannot exist; `canonicalize` refuses its shape.
    if (__builtin_mul_overflow(contiguous, tensor.shape[axis], &contiguous)) contiguous = 0;
  }
  borrowed.set_element(tensor.dtype.lanes == 1 ? tensor.dtype.code : ElementCode::kOther, tensor.dtype.bits);
}

// ---- lending --------------------------------------------------------------------------------------------------------

// What a capsule of ours points to.
template <class Managed>
struct Lent {
  Managed managed;
  std::shared_ptr<std::byte> memory;
  int64_t shape[kMaxRank], strides[kMaxRank];
};

template <class Managed>
py::capsule lend(const TensorView& view, const std::shared_ptr<std::byte>& memory) {
  auto lent = std::make_unique<Lent<Managed>>();
  lent->memory = memory;
  std::copy_n(view.shape, view.rank, lent->shape);
  std::copy_n(view.stride, view.rank, lent->strides);
  Managed& managed = lent->managed;
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
    managed.major = 1;
    managed.minor = 0;
    managed.flags = 0;
  }
  managed.tensor = {view.data, {kDLCpu, 0}, view.rank, element_of(view.dtype), lent->shape, lent->strides, 0};
  managed.context = lent.get();
  managed.deleter = [](Managed* self) { delete static_cast<Lent<Managed>*>(self->context); };
  // Whoever takes the array over renames the capsule and calls the deleter; a capsule that nobody took still has its
  // name.
  PyObject* capsule = PyCapsule_New(&managed, kCapsuleName<Managed>, [](PyObject* self) {
    if (!PyCapsule_IsValid(self, kCapsuleName<Managed>)) return;
    auto* untaken = static_cast<Managed*>(PyCapsule_GetPointer(self, kCapsuleName<Managed>));
    untaken->deleter(untaken);
  });
  if (capsule == nullptr) throw py::error_already_set();
  lent.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace

void BorrowedArray::set_element(ElementCode element_code, uint8_t element_bits) {
  code = element_code;
  bits = element_bits;
  for (const Element& element : kElements) {
    if (element.code != code || element.bits != bits) continue;
    view.dtype = element.dtype;
    readable = true;
  }
}

BorrowedArray borrow_dlpack(const char* name, py::handle array) {
  require_cpu(name, device_of(name, array));
  BorrowedArray borrowed;
  // While the capsule keeps its name, nobody has taken the array over and its destructor gives the array back.
  borrowed.lease = export_capsule(array);
  PyObject* capsule = borrowed.lease.ptr();
  if (PyCapsule_IsValid(capsule, kCapsuleName<DLManagedTensorVersioned>)) {
    const auto* managed = static_cast<const DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule, kCapsuleName<DLManagedTensorVersioned>));
    if (managed->major != 1) {
      reject_type(std::string(name) + " speaks DLPack " + std::to_string(managed->major) + ", expected 1");
    }
    read(name, managed->tensor, borrowed);
    borrowed.writable = (managed->flags & (kReadOnly | kIsCopied)) == 0;
    return borrowed;
  }
  if (!PyCapsule_IsValid(capsule, kCapsuleName<DLManagedTensor>)) {
    reject_type(std::string(name) + ".__dlpack__() gave " + py::repr(borrowed.lease).cast<std::string>() +
                ", expected a capsule named \"dltensor\" or \"dltensor_versioned\"");
  }
  const auto* managed =
      static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName<DLManagedTensor>));
  read(name, managed->tensor, borrowed);
  return borrowed;
}

TensorView contiguous_view(void* data, DType dtype, const int64_t* shape, int rank) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = rank;
  int64_t stride = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    view.shape[axis] = shape[axis];
    view.stride[axis] = stride;
    stride *= std::max<int64_t>(shape[axis], 1);
  }
  return view;
}

HostArray::HostArray(DType dtype, const int64_t* shape, int rank) {
  constexpr size_t kAlignment = 64;
  size_t nbytes = static_cast<size_t>(itemsize(dtype));
  for (int axis = 0; axis < rank; ++axis) nbytes *= static_cast<size_t>(shape[axis]);
  memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, (nbytes / kAlignment + 1) * kAlignment)),
                [](std::byte* p) { std::free(p); });
  if (memory_ == nullptr) throw std::bad_alloc();
  view_ = contiguous_view(memory_.get(), dtype, shape, rank);
}

py::capsule HostArray::dlpack(const py::object& max_version) const {
  const bool versioned = !max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1;
  return versioned ? lend<DLManagedTensorVersioned>(view_, memory_) : lend<DLManagedTensor>(view_, memory_);
}

void bind_dlpack(py::module_& module) {
  py::class_<HostArray>(module, "HostArray", "Memory of a result on its way into the caller's array library.")
      .def(
          "__dlpack__",
          [](const HostArray& self, const py::object&, const py::object& max_version, const py::object&,
             const py::object&) { return self.dlpack(max_version); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const HostArray&) { return py::make_tuple(kDLCpu, 0); });
}

}  // namespace foveal
