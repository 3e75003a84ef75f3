// DLPack (dmlc/dlpack 1.1 and the Python array API standard's data interchange): CPU arrays of any library as views,
// and memory of our own that any library can take over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "foveal/tensor_view.h"

namespace foveal {

// What an element is, with the numbers that DLPack gives them.
enum class ElementCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6, kOther = 255 };

// An array that a library lent to us; it gets it back when this object goes.
struct BorrowedArray {
  TensorView view;
  ElementCode code = ElementCode::kOther;
  uint8_t bits = 0;
  bool readable = false;  // DType has a name for `code` and `bits`, and the view carries it
  bool swapped = false;   // the bytes of its elements are in the other order than ours
  bool writable = false;  // the lender says so; before DLPack 1.0 it cannot
  pybind11::object lease;

  void set_element(ElementCode element_code, uint8_t element_bits);
};

// Borrows `array`, which has __dlpack__. Throws Rejection with `name` when it is not in CPU memory or does not keep to
// the protocol.
BorrowedArray borrow_dlpack(const char* name, pybind11::handle array);

TensorView contiguous_view(void* data, DType dtype, const int64_t* shape, int rank);

// A C-contiguous array in 64-byte aligned memory (JAX copies from less), which from_dlpack of any library accepts.
class HostArray {
 public:
  HostArray(DType dtype, const int64_t* shape, int rank);

  const TensorView& view() const { return view_; }
  pybind11::capsule dlpack(const pybind11::object& max_version) const;

 private:
  TensorView view_;
  std::shared_ptr<std::byte> memory_;
};

void bind_dlpack(pybind11::module_& module);

}  // namespace foveal
