// The Python object around an IndexedHeap, and the methods that have files of their own; heap.cc has the rest.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "bindings/batch.h"
#include "bindings/native_type.h"
#include "foveal/indexed_heap.h"

namespace foveal {

// A plain pointer: CPython makes and frees the object, and the heap wants more alignment than it gives.
struct HeapObject {
  PyObject_HEAD IndexedHeap* heap;
};

inline IndexedHeap& heap_of(PyObject* self) { return *reinterpret_cast<HeapObject*>(self)->heap; }

inline std::unique_ptr<IndexedHeap> make_heap(int64_t capacity, bool max) {
  return std::make_unique<IndexedHeap>(capacity, max ? Order::kMax : Order::kMin);
}

inline PyObject* new_object(PyTypeObject* type, std::unique_ptr<IndexedHeap> heap) {
  PyObject* object = checked(type->tp_alloc(type, 0));
  reinterpret_cast<HeapObject*>(object)->heap = heap.release();
  return object;
}

inline PyObject* pair_of_entry(const HeapEntry& entry) {
  return pair_of(PyLong_FromLongLong(entry.id), PyFloat_FromDouble(entry.priority));
}

// The ids and priorities of a call, checked.
struct Writes {
  Batch<int64_t> ids;
  Batch<double> priorities;

  Writes(const char* function, PyObject* ids_argument, PyObject* priorities_argument, int64_t capacity)
      : ids(read_ids(function, "ids", ids_argument, capacity)),
        priorities(read_numbers(function, "priorities", priorities_argument, ids.count)) {}
};

// ---- heap_batches.cc ------------------------------------------------------------------------------------------------

PyObject* push_many(HeapObject& self, Call call);
PyObject* update_many(HeapObject& self, Call call);
PyObject* pop_many(HeapObject& self, Call call);

// ---- heap_contents.cc -----------------------------------------------------------------------------------------------

std::unique_ptr<IndexedHeap> copy_of(IndexedHeap& heap);
PyObject* from_arrays(PyTypeObject& type, Call call);
PyObject* copy(HeapObject& self, Call call);
PyObject* clear(HeapObject& self, Call call);
PyObject* reduce(HeapObject& self, Call call);
PyObject* set_state(HeapObject& self, Call call);

// ---- heap_iterator.cc -----------------------------------------------------------------------------------------------

PyObject* iterate_heap(PyObject* self);
PyObject* iter_sorted(HeapObject& self, Call call);
void bind_heap_iterator(pybind11::module_& module);

}  // namespace foveal
