// The arrays of one call: the caller's as views, and new ones of the caller's kind for the results.
//
// A kind is NumPy, or one library whose CPU arrays speak DLPack. The kind of q is the kind of the call. Integers per
// batch element (lengths, offsets) may come from anywhere. Only what a TensorView cannot express is refused here:
// foreign types, dtypes and byte orders, strides of a fraction of an element, read-only outputs; the rest is for
// `canonicalize`.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "foveal/tensor_view.h"

namespace foveal {

// The int that `value` is by __index__. Null for what has none and for bools, NumPy's too, which had one until
// NumPy 2.3; null with a Python exception set where __index__ raised.
pybind11::object integer_of(pybind11::handle value);

// "torch.Tensor", "list": for texts.
std::string type_text(pybind11::handle object);

enum class Access { kRead, kWrite };
enum class Elements { kFloating, kBool };

// Methods throw Rejection, or error_already_set when Python code that they call failed. The views stay valid while this
// object and the arguments of the call live. To be made and destroyed with the GIL held.
class CallArrays {
 public:
  explicit CallArrays(pybind11::handle q);

  // The view of an argument, whose elements should be as said: one that DType cannot name is refused here, any other by
  // `canonicalize`.
  TensorView view(const char* name, pybind11::handle array, Elements elements, Access access = Access::kRead);

  // A list, tuple or array of integers of any width as int64; an integer as rank 0; absent for None. Copied: another
  // thread may change the caller's while the GIL is released, and kernels trust what was checked. An array of another
  // shape than () or (batch,) is not read at all.
  TensorView integers(const char* name, pybind11::handle values, int64_t batch);
  static constexpr int64_t kAnyCount = -1;  // as `batch`

  // A floating array, or a Python number as one of rank 0.
  TensorView numbers(const char* name, pybind11::handle values);

  // The same of an array of shape (batch, any).
  TensorView table(const char* name, pybind11::handle values, int64_t batch);

  // A C-contiguous array for a result, and its view.
  pybind11::object allocate(DType dtype, const int64_t* shape, int rank, TensorView& view) const;

  // What `allocate` gave, as an array of the caller's kind.
  pybind11::object hand_over(pybind11::object result) const;

 private:
  BorrowedArray borrow(const char* name, pybind11::handle array) const;

  pybind11::handle q_;
  bool numpy_;
  std::vector<pybind11::object> leases_;
  std::vector<std::unique_ptr<int64_t[]>> integers_;
  std::vector<std::unique_ptr<double>> numbers_;
};

}  // namespace foveal
