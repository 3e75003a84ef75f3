// All of an IndexedHeap at once: made of arrays, copied, cleared, pickled.
#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "bindings/heap_object.h"

namespace py = pybind11;

namespace foveal {
namespace {

struct Contents {
  std::vector<int64_t> ids;
  std::vector<double> priorities;

  explicit Contents(IndexedHeap& heap) {
    without_gil(static_cast<size_t>(heap.capacity()), [&] {
      const auto expected = static_cast<size_t>(heap.size());
      ids.reserve(expected);
      priorities.reserve(expected);
      for (int64_t id = 0; id < heap.capacity(); ++id) {
        if (const std::optional<double> priority = heap.priority(id)) {
          ids.push_back(id);
          priorities.push_back(*priority);
        }
      }
    });
  }
};

// The attributes of an object whose class was derived in Python, or None.
py::object attributes_of(HeapObject& self) {
  return py::getattr(reinterpret_cast<PyObject*>(&self), "__dict__", py::none());
}

void set_attributes(py::handle object, const py::object& attributes) {
  if (!attributes.is_none()) object.attr("__dict__").attr("update")(attributes);
}

void check_attributes(const char* function, py::handle object, const py::object& attributes) {
  if (attributes.is_none() || (py::isinstance<py::dict>(attributes) && py::hasattr(object, "__dict__"))) return;
  fail(PyExc_TypeError, "%s: attributes are %R, expected a dict, or None where there is none", function,
       attributes.ptr());
}

}  // namespace

std::unique_ptr<IndexedHeap> copy_of(IndexedHeap& heap) {
  const Contents contents(heap);
  auto copy = std::make_unique<IndexedHeap>(heap.capacity(), heap.order());
  without_gil(static_cast<size_t>(heap.capacity()), [&] { copy->assign(contents.ids, contents.priorities); });
  return copy;
}

PyObject* from_arrays(PyTypeObject& type, Call call) {
  static constexpr Signature<4> kSignature = {
      "IndexedHeap.from_arrays", {"ids", "priorities", "capacity", "max"}, 2, 3};
  const auto [ids, priorities, capacity_argument, max_argument] = bind(kSignature, call);
  const bool max = max_argument != nullptr && to_bool(kSignature.function, "max", max_argument);
  std::unique_ptr<IndexedHeap> heap;
  if (capacity_argument != nullptr && capacity_argument != Py_None) {
    heap = make_heap(to_capacity(kSignature.function, capacity_argument, IndexedHeap::kMaxCapacity), max);
  }
  const Writes writes(kSignature.function, ids, priorities, heap ? heap->capacity() : IndexedHeap::kMaxCapacity);
  if (!heap) {
    if (writes.ids.count == 0) {
      fail(PyExc_ValueError, "%s: ids is empty, expected ids or a capacity", kSignature.function);
    }
    const std::span<const int64_t> span = writes.ids.span();
    heap = make_heap(*std::max_element(span.begin(), span.end()) + 1, max);
  }
  without_gil(static_cast<size_t>(heap->capacity()),
              [&] { heap->assign(writes.ids.span(), writes.priorities.span()); });
  return new_object(&type, std::move(heap));
}

PyObject* copy(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.copy", call);
  auto object = py::reinterpret_steal<py::object>(new_object(Py_TYPE(&self), copy_of(*self.heap)));
  set_attributes(object, attributes_of(self));
  return object.release().ptr();
}

PyObject* clear(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.clear", call);
  without_gil(static_cast<size_t>(self.heap->capacity()), [&] { self.heap->clear(); });
  Py_RETURN_NONE;
}

// The class is called again without its __init__, and the contents come as arrays.
PyObject* reduce(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.__reduce__", call);
  IndexedHeap& heap = *self.heap;
  const Contents contents(heap);
  const auto ids = py::reinterpret_steal<py::object>(to_array(contents.ids));
  const auto priorities = py::reinterpret_steal<py::object>(to_array(contents.priorities));
  py::dict keywords;
  keywords["max"] = heap.order() == Order::kMax;
  const auto type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(&self)));
  const py::object remake = py::module_::import("copyreg").attr("__newobj_ex__");
  const py::tuple state = py::make_tuple(ids, priorities, attributes_of(self));
  return py::make_tuple(remake, py::make_tuple(type, py::make_tuple(heap.capacity()), keywords), state).release().ptr();
}

PyObject* set_state(HeapObject& self, Call call) {
  static constexpr Signature<1> kSignature = {"IndexedHeap.__setstate__", {"state"}};
  PyObject* state = bind(kSignature, call)[0];
  if (!PyTuple_Check(state) || PyTuple_GET_SIZE(state) != 3) {
    fail(PyExc_TypeError, "%s: state is %R, expected (ids, priorities, attributes)", kSignature.function, state);
  }
  const py::handle object = reinterpret_cast<PyObject*>(&self);
  const auto attributes = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(state, 2));
  check_attributes(kSignature.function, object, attributes);
  const Writes writes(kSignature.function, PyTuple_GET_ITEM(state, 0), PyTuple_GET_ITEM(state, 1),
                      self.heap->capacity());
  self.heap->assign(writes.ids.span(), writes.priorities.span());
  set_attributes(object, attributes);
  Py_RETURN_NONE;
}

}  // namespace foveal
