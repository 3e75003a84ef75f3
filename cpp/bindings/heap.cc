#include "bindings/heap.h"

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "bindings/batch.h"
#include "bindings/native_type.h"
#include "foveal/indexed_heap.h"

namespace py = pybind11;

namespace foveal {
namespace {

// Plain pointers: CPython makes and frees the objects, and the heap wants more alignment than it gives.
struct HeapObject {
  PyObject_HEAD IndexedHeap* heap;
};

// Walks over the ids, as they are when their turn comes, or over a copy of the heap in order.
struct HeapIterator {
  PyObject_HEAD PyObject* ids_of;
  int64_t next;
  IndexedHeap* rest;
};

PyTypeObject* iterator_type = nullptr;
PyObject* empty_class = nullptr;

// ---- arguments and results ------------------------------------------------------------------------------------------

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

PyObject* pair_of_entry(const HeapEntry& entry) {
  return pair_of(PyLong_FromLongLong(entry.id), PyFloat_FromDouble(entry.priority));
}

PyObject* new_object(PyTypeObject* type, std::unique_ptr<IndexedHeap> heap) {
  PyObject* object = checked(type->tp_alloc(type, 0));
  reinterpret_cast<HeapObject*>(object)->heap = heap.release();
  return object;
}

std::unique_ptr<IndexedHeap> make_heap(int64_t capacity, bool max) {
  return std::make_unique<IndexedHeap>(capacity, max ? Order::kMax : Order::kMin);
}

// ---- one id ---------------------------------------------------------------------------------------------------------

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

// ---- batches --------------------------------------------------------------------------------------------------------

struct Writes {
  Batch<int64_t> ids;
  Batch<double> priorities;

  Writes(const char* function, PyObject* ids_argument, PyObject* priorities_argument, int64_t capacity)
      : ids(read_ids(function, "ids", ids_argument, capacity)),
        priorities(read_numbers(function, "priorities", priorities_argument, ids.count)) {}
};

// Before the first write: each id must be present, or each absent.
void check_presence(const char* function, const Writes& writes, IndexedHeap& heap, bool expected, const char* hint) {
  const std::span<const int64_t> ids = writes.ids.span();
  size_t i = 0;
  without_gil(ids.size(), [&] { i = expected ? heap.find_absent(ids) : heap.find_present(ids); });
  if (i == ids.size()) return;
  fail(expected ? PyExc_KeyError : PyExc_ValueError, "%s: ids[%zu] is %lld, which is %s, expected %s", function, i,
       static_cast<long long>(ids[i]), expected ? "absent" : "present", hint);
}

[[noreturn]] void report_skipped(PyObject* type, const char* function, const Writes& writes,
                                 const std::vector<size_t>& skipped, const char* why) {
  constexpr size_t kNamed = 10;
  std::string text;
  for (size_t i = 0; i < std::min(skipped.size(), kNamed); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(writes.ids[skipped[i]]);
  }
  if (skipped.size() > kNamed) text += ", ... (" + std::to_string(skipped.size()) + " in all)";
  fail(type, "%s: %s meanwhile by another thread: ids %s; the others were written", function, why, text.c_str());
}

// The heap keeps the first of duplicate ids, a batch of Python's the last. Leaves in `skipped` what another thread
// pushed.
void apply_duplicates(IndexedHeap& heap, const Writes& writes, std::vector<size_t>& skipped) {
  std::unordered_set<int64_t> ours, of_skipped;
  for (const size_t i : skipped) of_skipped.insert(writes.ids[i]);
  size_t next = 0;
  for (size_t i = 0; i < writes.ids.count; ++i) {
    if (next < skipped.size() && skipped[next] == i) {
      ++next;
    } else if (of_skipped.contains(writes.ids[i])) {
      ours.insert(writes.ids[i]);
    }
  }
  std::erase_if(skipped, [&](size_t i) {
    if (!ours.contains(writes.ids[i])) return false;
    heap.update(writes.ids[i], writes.priorities[i]);
    return true;
  });
}

PyObject* push_many(HeapObject& self, Call call) {
  static constexpr Signature<2> kSignature = {"IndexedHeap.push_many", {"ids", "priorities"}};
  const auto [ids, priorities] = bind(kSignature, call);
  IndexedHeap& heap = *self.heap;
  const Writes writes(kSignature.function, ids, priorities, heap.capacity());
  check_presence(kSignature.function, writes, heap, false, "absent ids");
  std::vector<size_t> skipped;
  without_gil(writes.ids.count, [&] {
    heap.push_many(writes.ids.span(), writes.priorities.span(), [&](size_t i) { skipped.push_back(i); });
    if (!skipped.empty()) apply_duplicates(heap, writes, skipped);
  });
  if (!skipped.empty()) report_skipped(PyExc_ValueError, kSignature.function, writes, skipped, "pushed");
  Py_RETURN_NONE;
}

enum class Missing { kRaise, kInsert, kIgnore };

Missing to_missing(PyObject* object) {
  if (object == nullptr) return Missing::kRaise;
  if (PyUnicode_Check(object)) {
    if (PyUnicode_CompareWithASCIIString(object, "raise") == 0) return Missing::kRaise;
    if (PyUnicode_CompareWithASCIIString(object, "insert") == 0) return Missing::kInsert;
    if (PyUnicode_CompareWithASCIIString(object, "ignore") == 0) return Missing::kIgnore;
  }
  fail(PyExc_ValueError, "IndexedHeap.update_many: missing is %R, expected 'raise', 'insert' or 'ignore'", object);
}

PyObject* update_many(HeapObject& self, Call call) {
  static constexpr Signature<3> kSignature = {"IndexedHeap.update_many", {"ids", "priorities", "missing"}, 2, 2};
  const auto bound = bind(kSignature, call);
  const Missing missing = to_missing(bound[2]);
  IndexedHeap& heap = *self.heap;
  const Writes writes(kSignature.function, bound[0], bound[1], heap.capacity());
  if (missing == Missing::kRaise) {
    check_presence(kSignature.function, writes, heap, true, "present ids, or missing='insert' or 'ignore'");
  }
  std::vector<size_t> skipped;
  without_gil(writes.ids.count, [&] {
    const std::span<const int64_t> ids = writes.ids.span();
    const std::span<const double> priorities = writes.priorities.span();
    if (missing == Missing::kInsert) {
      heap.upsert_many(ids, priorities);
    } else {
      heap.update_many(ids, priorities, [&](size_t i) {
        if (missing == Missing::kRaise) skipped.push_back(i);
      });
    }
  });
  if (!skipped.empty()) report_skipped(PyExc_KeyError, kSignature.function, writes, skipped, "removed");
  Py_RETURN_NONE;
}

PyObject* pop_many(HeapObject& self, Call call) {
  static constexpr Signature<2> kSignature = {"IndexedHeap.pop_many", {"k", "relaxed"}, 1, 1};
  const auto [k_argument, relaxed_argument] = bind(kSignature, call);
  const int64_t k = to_int64(kSignature.function, "k", k_argument);
  if (k < 0) fail(PyExc_ValueError, "%s: k is %S, expected at least 0", kSignature.function, k_argument);
  const bool relaxed = relaxed_argument != nullptr && to_bool(kSignature.function, "relaxed", relaxed_argument);
  IndexedHeap& heap = *self.heap;
  const auto most = static_cast<size_t>(std::min(k, heap.capacity()));
  const auto ids = std::make_unique_for_overwrite<int64_t[]>(most);
  const auto priorities = std::make_unique_for_overwrite<double[]>(most);
  size_t count = 0;
  // size() lags behind other threads: it says whether to let the GIL go, not what there is.
  without_gil(static_cast<size_t>(std::min(k, heap.size())), [&] {
    thread_local uint64_t random_state = reinterpret_cast<uintptr_t>(&random_state);
    const std::span<int64_t> id_span(ids.get(), most);
    const std::span<double> priority_span(priorities.get(), most);
    count =
        relaxed ? heap.pop_many_relaxed(id_span, priority_span, random_state) : heap.pop_many(id_span, priority_span);
  });
  PyObject* id_array = to_array(std::span<const int64_t>(ids.get(), count));
  return pair_of(id_array, to_array(std::span<const double>(priorities.get(), count)));
}

// ---- the whole heap -------------------------------------------------------------------------------------------------

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

std::unique_ptr<IndexedHeap> copy_of(IndexedHeap& heap) {
  const Contents contents(heap);
  auto copy = std::make_unique<IndexedHeap>(heap.capacity(), heap.order());
  without_gil(static_cast<size_t>(heap.capacity()), [&] { copy->assign(contents.ids, contents.priorities); });
  return copy;
}

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

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static constexpr Signature<2> kSignature = {"IndexedHeap", {"capacity", "max"}, 1, 1};
  return guarded<PyObject*>(nullptr, [&] {
    const auto [capacity, max] = bind(kSignature, arguments, keywords);
    return new_object(type, make_heap(to_capacity(kSignature.function, capacity, IndexedHeap::kMaxCapacity),
                                      max != nullptr && to_bool(kSignature.function, "max", max)));
  });
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

PyObject* size_of(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.__sizeof__", call);
  return PyLong_FromSize_t(static_cast<size_t>(Py_TYPE(&self)->tp_basicsize) + sizeof(IndexedHeap) +
                           static_cast<size_t>(self.heap->nbytes()));
}

// ---- slots ----------------------------------------------------------------------------------------------------------

IndexedHeap& heap_of(PyObject* self) { return *reinterpret_cast<HeapObject*>(self)->heap; }

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

// ---- iteration ------------------------------------------------------------------------------------------------------

PyObject* new_iterator(PyObject* ids_of, std::unique_ptr<IndexedHeap> rest) {
  PyObject* object = checked(iterator_type->tp_alloc(iterator_type, 0));
  auto* iterator = reinterpret_cast<HeapIterator*>(object);
  iterator->ids_of = Py_XNewRef(ids_of);
  iterator->rest = rest.release();
  return object;
}

PyObject* iterate(PyObject* self) {
  return guarded<PyObject*>(nullptr, [&] { return new_iterator(self, nullptr); });
}

PyObject* iter_sorted(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.iter_sorted", call);
  return new_iterator(nullptr, copy_of(*self.heap));
}

PyObject* next(PyObject* self) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    auto* iterator = reinterpret_cast<HeapIterator*>(self);
    if (iterator->rest != nullptr) {
      const std::optional<HeapEntry> entry = iterator->rest->pop();
      return entry ? pair_of_entry(*entry) : nullptr;
    }
    if (iterator->ids_of == nullptr) return nullptr;  // the garbage collector has been here
    IndexedHeap& heap = heap_of(iterator->ids_of);
    while (iterator->next < heap.capacity()) {
      const int64_t id = iterator->next++;
      if (heap.contains(id)) return PyLong_FromLongLong(id);
    }
    return nullptr;
  });
}

int traverse_iterator(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<HeapIterator*>(self)->ids_of);
  return 0;
}

int drop_heap(PyObject* self) {
  Py_CLEAR(reinterpret_cast<HeapIterator*>(self)->ids_of);
  return 0;
}

void free_iterator(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  auto* iterator = reinterpret_cast<HeapIterator*>(self);
  Py_XDECREF(iterator->ids_of);
  delete iterator->rest;
  type->tp_free(self);
  Py_DECREF(type);
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
      {Py_tp_doc, const_cast<char*>(kDoc)},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      slot(Py_tp_new, make),
      slot(Py_tp_dealloc, free_heap),
      slot(Py_tp_repr, repr),
      slot(Py_tp_iter, iterate),
      slot(Py_sq_contains, contains),
      slot(Py_sq_length, length),
      {0, nullptr},
  };
  PyType_Spec heap_spec = {"foveal.IndexedHeap", sizeof(HeapObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                           heap_slots};
  add_type(module, heap_spec);

  PyType_Slot iterator_slots[] = {
      slot(Py_tp_dealloc, free_iterator), slot(Py_tp_traverse, traverse_iterator),
      slot(Py_tp_clear, drop_heap),       slot(Py_tp_iter, PyObject_SelfIter),
      slot(Py_tp_iternext, next),         {0, nullptr},
  };
  PyType_Spec iterator_spec = {"foveal._core._HeapIterator", sizeof(HeapIterator), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                               iterator_slots};
  iterator_type = add_type(module, iterator_spec);
}

}  // namespace foveal
