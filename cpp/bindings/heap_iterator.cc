// Iteration over an IndexedHeap: over its ids, or over a copy in order.
#include <memory>
#include <optional>

#include "bindings/heap_object.h"

namespace foveal {
namespace {

// Walks over the ids, as they are when their turn comes, or over a copy of the heap in order.
struct HeapIterator {
  PyObject_HEAD PyObject* ids_of;
  int64_t next;
  IndexedHeap* rest;
};

PyTypeObject* iterator_type = nullptr;

PyObject* new_iterator(PyObject* ids_of, std::unique_ptr<IndexedHeap> rest) {
  PyObject* object = checked(iterator_type->tp_alloc(iterator_type, 0));
  auto* iterator = reinterpret_cast<HeapIterator*>(object);
  iterator->ids_of = Py_XNewRef(ids_of);
  iterator->rest = rest.release();
  return object;
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

}  // namespace

PyObject* iterate_heap(PyObject* self) {
  return guarded<PyObject*>(nullptr, [&] { return new_iterator(self, nullptr); });
}

PyObject* iter_sorted(HeapObject& self, Call call) {
  no_arguments("IndexedHeap.iter_sorted", call);
  return new_iterator(nullptr, copy_of(*self.heap));
}

void bind_heap_iterator(pybind11::module_& module) {
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
