#include "bindings/heap.h"

#include <optional>
#include <string>

#include "bindings/heap_object.h"
#include "bindings/native_type.h"
#include "foveal/indexed_heap.h"

namespace py = pybind11;

namespace foveal {
namespace {

PyObject* empty_class = nullptr;

// ---- one id ---------------------------------------------------------------------------------------------------------

int64_t to_id(const char* function, PyObject* object, const IndexedHeap& heap) {
  const int64_t id = to_int64(function, "id", object);
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(heap.capacity())) {
    fail(PyExc_IndexError, "%s: id is %S, expected 0 to %lld", function, object,
         static_cast<long long>(heap.capacity() - 1));
  }
  return id;
}

[[noreturn]] void refuse_id(PyObject* type, const char* function, int64_t id, const char* state, const char* expected) {
  fail(type, "%s: id %lld is %s, expected %s", function, static_cast<long long>(id), state, expected);
}

[[noreturn]] void refuse_empty(const char* function) { fail(empty_class, "%s: the heap is empty", function); }

template <size_t kCount>
struct IdCall {
  int64_t id;
  double priority = 0;

  IdCall(const Signature<kCount>& signature, Call call, const IndexedHeap& heap) {
    const auto bound = bind(signature, call);
    id = to_id(signature.function, bound[0], heap);
    if constexpr (kCount == 2) priority = to_number(signature.function, "priority", bound[1]);
  }
};

constexpr Signature<2> id_and_priority(const char* function) { return {function, {"id", "priority"}}; }
constexpr Signature<1> only_id(const char* function) { return {function, {"id"}}; }

PyObject* push(HeapObject& self, Call call) {
  static constexpr auto kSignature = id_and_priority("IndexedHeap.push");
  const IdCall of(kSignature, call, *self.heap);
  if (!self.heap->push(of.id, of.priority)) {
    refuse_id(PyExc_ValueError, kSignature.function, of.id, "present", "an absent id");
  }
  Py_RETURN_NONE;
}

PyObject* update(HeapObject& self, Call call) {
  static constexpr auto kSignature = id_and_priority("IndexedHeap.update");
  const IdCall of(kSignature, call, *self.heap);
  if (!self.heap->update(of.id, of.priority)) {
    refuse_id(PyExc_KeyError, kSignature.function, of.id, "absent", "a present id");
  }
  Py_RETURN_NONE;
}

PyObject* upsert(HeapObject& self, Call call) {
  static constexpr auto kSignature = id_and_priority("IndexedHeap.upsert");
  const IdCall of(kSignature, call, *self.heap);
  return PyBool_FromLong(self.heap->upsert(of.id, of.priority));
}

PyObject* remove(HeapObject& self, Call call) {
  static constexpr auto kSignature = only_id("IndexedHeap.remove");
  const IdCall of(kSignature, call, *self.heap);
  const std::optional<double> priority = self.heap->remove(of.id);
  if (!priority) refuse_id(PyExc_KeyError, kSignature.function, of.id, "absent", "a present id");
  return PyFloat_FromDouble(*priority);
}

PyObject* discard(HeapObject& self, Call call) {
  static constexpr auto kSignature = only_id("IndexedHeap.discard");
  const IdCall of(kSignature, call, *self.heap);
  return PyBool_FromLong(self.heap->remove(of.id).has_value());
}

PyObject* priority(HeapObject& self, Call call) {
  static constexpr auto kSignature = only_id("IndexedHeap.priority");
  const IdCall of(kSignature, call, *self.heap);
  const std::optional<double> priority = self.heap->priority(of.id);
  if (!priority) refuse_id(PyExc_KeyError, kSignature.function, of.id, "absent", "a present id");
  return PyFloat_FromDouble(*priority);
}

PyObject* pop(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.pop", call);
  const std::optional<HeapEntry> entry = self.heap->pop();
  if (!entry) refuse_empty("IndexedHeap.pop");
  return pair_of_entry(*entry);
}

PyObject* peek(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.peek", call);
  const std::optional<HeapEntry> entry = self.heap->peek();
  if (!entry) refuse_empty("IndexedHeap.peek");
  return pair_of_entry(*entry);
}

// ---- slots ----------------------------------------------------------------------------------------------------------

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static constexpr Signature<2> kSignature = {"IndexedHeap", {"capacity", "max"}, 1, 1};
  return guarded<PyObject*>(nullptr, [&] {
    const auto [capacity, max] = bind(kSignature, arguments, keywords);
    return new_object(type, make_heap(to_capacity(kSignature.function, capacity, IndexedHeap::kMaxCapacity),
                                      max != nullptr && to_bool(kSignature.function, "max", max)));
  });
}

void free_heap(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<HeapObject*>(self)->heap;
  type->tp_free(self);
  Py_DECREF(type);
}

Py_ssize_t length(PyObject* self) { return static_cast<Py_ssize_t>(heap_of(self).size()); }

// An id out of range is in no heap.
int contains(PyObject* self, PyObject* object) {
  return guarded(-1, [&] {
    const int64_t id = to_int64("IndexedHeap.__contains__", "id", object);
    IndexedHeap& heap = heap_of(self);
    return 0 <= id && id < heap.capacity() && heap.contains(id) ? 1 : 0;
  });
}

PyObject* repr(PyObject* self) {
  return guarded<PyObject*>(nullptr, [&] {
    IndexedHeap& heap = heap_of(self);
    std::string text = "<" + std::string(Py_TYPE(self)->tp_name) + (heap.order() == Order::kMax ? ", max" : "") + ": " +
                       std::to_string(heap.size()) + " of " + std::to_string(heap.capacity()) + " ids";
    if (const std::optional<HeapEntry> first = heap.peek()) {
      text += ", first (" + std::to_string(first->id) + ", " + std::string(py::repr(py::float_(first->priority))) + ")";
    }
    return py::str(text + ">").release().ptr();
  });
}

PyObject* get_capacity(PyObject* self, void*) { return PyLong_FromLongLong(heap_of(self).capacity()); }
PyObject* get_max(PyObject* self, void*) { return PyBool_FromLong(heap_of(self).order() == Order::kMax); }

PyObject* size_of(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.__sizeof__", call);
  return PyLong_FromSize_t(static_cast<size_t>(Py_TYPE(&self)->tp_basicsize) + sizeof(IndexedHeap) +
                           static_cast<size_t>(self.heap->nbytes()));
}

// ---- tables ---------------------------------------------------------------------------------------------------------

constexpr const char* kDoc = R"(IndexedHeap(capacity, *, max=False)
--

A lock-free priority heap over the ids 0 .. capacity-1, each absent or present with a priority that may change.

Any number of threads may use it at once, one call at a time or in batches, which release the GIL (from 128 elements
on). Each call, and each element of a batch, takes effect at one moment between its beginning and its end, as if the
others had come before or after it. No thread ever waits for another that was suspended.

The smallest priority comes first, with `max` the largest; equal priorities by lowest id. Priorities are float64:
infinities are fine, NaN is refused, -0.0 becomes 0.0. An integer that float64 cannot hold is refused, so that it cannot
be out of order; a Decimal or a Fraction becomes the nearest float64, as float() has it. `len`, iteration, `clear`, `copy` and pickle look at one id after another: while others
write, what they see need not have been there at any one moment. For keys that are not small integers and for first in,
first out among equals there is `PriorityMap`.

Parameters
----------
capacity : int
    1 to 2**28. About 18.3 bytes each are allocated at once; it never grows.
max : bool
    The largest priority first.

Raises
------
IndexError
    An id is not in range(capacity), in every method. (`id in heap` is then False.)
TypeError
    An id is no integer, a priority no real number; in batches: ids are not int32 or int64, priorities not float32 or
    float64.
ValueError
    A priority is NaN, or an integer that float64 cannot hold (some beyond 2**53); capacity is out of range.
KeyError, ValueError
    An id is absent where it must be present; present where it must be absent.
foveal.Empty
    Nothing to pop or peek at.

A batch (NumPy arrays with any strides, torch tensors on the CPU, lists) is checked as a whole before the first
write. Of duplicate ids the last counts. An id that another thread removes between the check and its turn is skipped
and named in the KeyError, after the others were written.

References
----------
Jayanti 2002, "f-arrays: implementation and applications".

Examples
--------
>>> import foveal
>>> heap = foveal.IndexedHeap(100)
>>> heap.push(7, 0.5)
>>> heap.push_many([3, 4, 5], [0.7, 0.1, 0.3])
>>> heap.update(7, 0.2)
>>> heap.peek()
(4, 0.1)
>>> heap.pop_many(2)
(array([4, 7]), array([0.1, 0.2]))
>>> heap
<foveal.IndexedHeap: 2 of 100 ids, first (5, 0.3)>
)";

PyMethodDef methods[] = {
    method_entry<HeapObject, push>("push", R"(push($self, id, priority)
--

Insert an absent id. ValueError when it is present.)"),
    method_entry<HeapObject, update>("update", R"(update($self, id, priority)
--

Change the priority of a present id. KeyError when it is absent.)"),
    method_entry<HeapObject, upsert>("upsert", R"(upsert($self, id, priority)
--

Insert the id or change its priority; return whether it was present.)"),
    method_entry<HeapObject, remove>("remove", R"(remove($self, id)
--

Remove a present id and return its priority. KeyError when it is absent.)"),
    method_entry<HeapObject, discard>("discard", R"(discard($self, id)
--

Remove the id if it is present; return whether it was.)"),
    method_entry<HeapObject, pop>("pop", R"(pop($self)
--

Remove the first element and return it as (id, priority). Empty when there is none.)"),
    method_entry<HeapObject, peek>("peek", R"(peek($self)
--

Return the first element as (id, priority) and leave it. Empty when there is none.)"),
    method_entry<HeapObject, priority>("priority", R"(priority($self, id)
--

Return the priority of a present id. KeyError when it is absent.)"),
    method_entry<HeapObject, push_many>("push_many", R"(push_many($self, ids, priorities)
--

Insert absent ids. ValueError, and nothing inserted, when one is present.

Parameters
----------
ids : (n,) int32 or int64
priorities : (n,) float32 or float64)"),
    method_entry<HeapObject, update_many>("update_many", R"(update_many($self, ids, priorities, *, missing='raise')
--

Change the priorities of many ids.

Parameters
----------
ids : (n,) int32 or int64
priorities : (n,) float32 or float64
missing : "raise", "insert" or "ignore"
    What to do with absent ids. "raise": KeyError, and nothing changed.)"),
    method_entry<HeapObject, pop_many>("pop_many", R"(pop_many($self, k, *, relaxed=False)
--

Remove the first k elements, or all there are, and return them in order.

Parameters
----------
k : int
    At least 0.
relaxed : bool
    Take each time the better of the first elements of two random subtrees (16 to 127 subtrees, when there are that many
    ids): threads that pop so get less in each other's way, and on average some dozen better elements are passed over.
    The result is then in no order.

Returns
-------
ids : (m,) int64
priorities : (m,) float64)"),
    method_entry<HeapObject, iter_sorted>("iter_sorted", R"(iter_sorted($self)
--

Iterate over a copy as (id, priority), first to last. The heap is left as it is.)"),
    method_entry<HeapObject, clear>("clear", R"(clear($self)
--

Remove each id in turn.)"),
    method_entry<HeapObject, copy>("copy", R"(copy($self)
--

Return another heap with the same contents.)"),
    method_entry<PyTypeObject, from_arrays>("from_arrays",
                                            R"(from_arrays($type, ids, priorities, capacity=None, *, max=False)
--

Build a heap in one pass, O(capacity).

Parameters
----------
ids : (n,) int32 or int64
    Of duplicates the last counts.
priorities : (n,) float32 or float64
capacity : int, optional
    Default: the largest id + 1.
max : bool
    The largest priority first.)",
                                            METH_CLASS),
    method_entry<HeapObject, copy>("__copy__", "__copy__($self)\n--\n\n"),
    method_entry<HeapObject, reduce>("__reduce__", "__reduce__($self)\n--\n\n"),
    method_entry<HeapObject, set_state>("__setstate__", "__setstate__($self, state)\n--\n\n"),
    method_entry<HeapObject, size_of>("__sizeof__", "__sizeof__($self)\n--\n\n"),
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"capacity", get_capacity, nullptr, "How many ids there are, present or absent.", nullptr},
    {"max", get_max, nullptr, "Whether the largest priority comes first.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

PyObject* empty_error() { return empty_class; }

void bind_heap(py::module_& module) {
  const py::tuple bases =
      py::make_tuple(py::module_::import("queue").attr("Empty"), py::reinterpret_borrow<py::object>(PyExc_KeyError));
  empty_class = PyErr_NewExceptionWithDoc("foveal.Empty", "Nothing to take out.", bases.ptr(), nullptr);
  if (empty_class == nullptr) throw py::error_already_set();
  module.attr("Empty") = py::handle(empty_class);

  PyType_Slot heap_slots[] = {
      {Py_tp_doc, const_cast<char*>(kDoc)}, {Py_tp_methods, methods},
      {Py_tp_getset, properties},           slot(Py_tp_new, make),
      slot(Py_tp_dealloc, free_heap),       slot(Py_tp_repr, repr),
      slot(Py_tp_iter, iterate_heap),       slot(Py_sq_contains, contains),
      slot(Py_sq_length, length),           {0, nullptr},
  };
  PyType_Spec heap_spec = {"foveal.IndexedHeap", sizeof(HeapObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                           heap_slots};
  add_type(module, heap_spec);
  bind_heap_iterator(module);
}

}  // namespace foveal
