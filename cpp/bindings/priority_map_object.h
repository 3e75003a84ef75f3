// The Python object around the keys and the heap of a PriorityMap, and the methods that have a file of their own;
// priority_map.cc has the rest.
#pragma once

#include <pybind11/pybind11.h>

#include <new>

#include "bindings/key_table.h"
#include "bindings/native_type.h"
#include "foveal/fifo_heap.h"

namespace foveal {

// Keys and heap change together, with no Python code in between: whoever comes in (another thread, __eq__ of a key,
// __del__ of a removed one) finds both or neither.
struct Map {
  KeyTable keys;
  FifoHeap heap;

  void insert(PyObject* key, Py_hash_t hash, double priority) {
    const KeyTable::Id id = keys.insert(key, hash);
    try {
      heap.push(id, priority);
    } catch (...) {
      Py_DECREF(keys.erase(id));
      throw;
    }
  }

  // Gives the reference to the key away.
  PyObject* take(KeyTable::Id id) {
    heap.remove(id);
    return keys.erase(id);
  }
};

struct MapObject {
  PyObject_HEAD Map* map;
};

inline Map& map_of(PyObject* self) { return *reinterpret_cast<MapObject*>(self)->map; }

// Without the GIL, one thread at a time; with it that is so anyway.
template <class Result, class Body>
Result locked(PyObject* self, Result error, Body&& body) {
#ifdef Py_GIL_DISABLED
  PyCriticalSection section;
  PyCriticalSection_Begin(&section, self);
  const Result result = guarded<Result>(error, [&] { return body(map_of(self)); });
  PyCriticalSection_End(&section);
  return result;
#else
  return guarded<Result>(error, [&] { return body(map_of(self)); });
#endif
}

// A key, and where it is in the map, or kNone.
struct Found {
  PyObject* key;
  Py_hash_t hash;
  KeyTable::Id id;

  Found(const Map& map, PyObject* wanted)
      : key(wanted), hash(KeyTable::hash_of(wanted)), id(map.keys.find(wanted, hash)) {}
};

inline void upsert(Map& map, PyObject* key, double priority) {
  const Found found(map, key);
  found.id == KeyTable::kNone ? map.insert(key, found.hash, priority) : map.heap.update(found.id, priority);
}

inline PyObject* new_object(PyTypeObject* type) {
  PyObject* object = checked(type->tp_alloc(type, 0));
  try {
    reinterpret_cast<MapObject*>(object)->map = new Map();
  } catch (const std::bad_alloc&) {
    Py_DECREF(object);
    throw;
  }
  return object;
}

// ---- priority_map_contents.cc ---------------------------------------------------------------------------------------

// Makes the map what `data` says, as dict() would: a mapping, or pairs. Nothing has changed when it fails.
void fill(PyObject* self, const char* function, PyObject* data, bool max);

PyObject* clear(MapObject& self, Call call);
PyObject* copy(MapObject& self, Call call);
PyObject* items(Map& map, Call call);
PyObject* get_state(Map& map, Call call);
PyObject* set_state(MapObject& self, Call call);

}  // namespace foveal
