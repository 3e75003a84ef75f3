// All of a PriorityMap at once: filled, cleared, copied, listed, pickled.
#include <utility>
#include <vector>

#include "bindings/priority_map_object.h"

namespace py = pybind11;

namespace foveal {
namespace {

// What dict() would iterate over: the items of a mapping, else `data`.
py::object pairs_of(PyObject* data) {
  if (PyObject_HasAttrString(data, "keys") == 0) return py::reinterpret_borrow<py::object>(data);
  if (PyObject_HasAttrString(data, "items") != 0) {
    return py::reinterpret_steal<py::object>(checked(PyObject_CallMethod(data, "items", nullptr)));
  }
  return py::reinterpret_steal<py::object>(
             checked(PyObject_CallOneArg(reinterpret_cast<PyObject*>(&PyDict_Type), data)))
      .attr("items")();
}

// [(key, priority), ...] by age, so that equals keep their order. Wherever a tuple or a list is made, the garbage
// collector can run Python code, which can change the map: so all is taken out of it first.
py::list list_items(const Map& map) {
  const std::vector<KeyTable::Id> ids = map.heap.by_age();
  std::vector<py::object> keys;
  std::vector<double> priorities;
  keys.reserve(ids.size());
  priorities.reserve(ids.size());
  for (const KeyTable::Id id : ids) {
    keys.push_back(py::reinterpret_borrow<py::object>(map.keys.key(id)));
    priorities.push_back(map.heap.priority(id));
  }
  py::list items;
  for (size_t i = 0; i < keys.size(); ++i) {
    items.append(
        py::reinterpret_steal<py::object>(pair_of(keys[i].release().ptr(), PyFloat_FromDouble(priorities[i]))));
  }
  return items;
}

}  // namespace

void fill(PyObject* self, const char* function, PyObject* data, bool max) {
  Map fresh{{}, FifoHeap(max)};
  if (data != nullptr) {
    const py::object items = pairs_of(data);
    const auto iterator = py::reinterpret_steal<py::object>(checked(PyObject_GetIter(items.ptr())));
    while (const auto item = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr()))) {
      const auto pair = py::reinterpret_steal<py::object>(PySequence_Tuple(item.ptr()));
      if (!pair && PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw PythonError{};
      if (!pair || PyTuple_GET_SIZE(pair.ptr()) != 2) {
        PyErr_Clear();
        fail(PyExc_TypeError, "%s: data holds %R, expected (key, priority)", function, item.ptr());
      }
      upsert(fresh, PyTuple_GET_ITEM(pair.ptr(), 0), to_number(function, "priority", PyTuple_GET_ITEM(pair.ptr(), 1)));
    }
    if (PyErr_Occurred() != nullptr) throw PythonError{};
  }
  const int done = locked(self, -1, [&](Map& map) {
    map.keys.swap(fresh.keys);
    std::swap(map.heap, fresh.heap);
    return 0;
  });
  if (done != 0) throw PythonError{};
}  // the old keys go with `fresh`

PyObject* clear(MapObject& self, Call call) {
  no_arguments("PriorityMap.clear", call);
  fill(reinterpret_cast<PyObject*>(&self), "PriorityMap.clear", nullptr, self.map->heap.max());
  Py_RETURN_NONE;
}

PyObject* copy(MapObject& self, Call call) {
  no_arguments("PriorityMap.copy", call);
  PyObject* object = new_object(Py_TYPE(&self));
  const int done = locked(reinterpret_cast<PyObject*>(&self), -1, [&](Map& map) {
    KeyTable keys(map.keys);
    FifoHeap heap(map.heap);
    map_of(object).keys.swap(keys);
    std::swap(map_of(object).heap, heap);
    return 0;
  });
  if (done != 0) {
    Py_DECREF(object);
    throw PythonError{};
  }
  return object;
}

PyObject* items(Map& map, Call call) {
  no_arguments("PriorityMap._items", call);
  return list_items(map).release().ptr();
}

// (max, items)
PyObject* get_state(Map& map, Call call) {
  no_arguments("PriorityMap.__getstate__", call);
  const bool max = map.heap.max();
  return pair_of(PyBool_FromLong(max), list_items(map).release().ptr());
}

PyObject* set_state(MapObject& self, Call call) {
  static constexpr Signature<1> kSignature = {"PriorityMap.__setstate__", {"state"}};
  PyObject* state = bind(kSignature, call)[0];
  if (!PyTuple_Check(state) || PyTuple_GET_SIZE(state) != 2) {
    fail(PyExc_TypeError, "%s: state is %R, expected (max, items)", kSignature.function, state);
  }
  fill(reinterpret_cast<PyObject*>(&self), kSignature.function, PyTuple_GET_ITEM(state, 1),
       to_bool(kSignature.function, "max", PyTuple_GET_ITEM(state, 0)));
  Py_RETURN_NONE;
}

}  // namespace foveal
