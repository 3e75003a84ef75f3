#include "bindings/priority_map.h"

#include <cmath>
#include <utility>

#include "bindings/heap.h"
#include "bindings/native_type.h"
#include "bindings/priority_map_object.h"

namespace py = pybind11;

namespace foveal {
namespace {

using Id = KeyTable::Id;
constexpr Id kNone = KeyTable::kNone;

template <auto kBody>
PyObject* locked_method(MapObject& self, Call call) {
  PyObject* result =
      locked<PyObject*>(reinterpret_cast<PyObject*>(&self), nullptr, [&](Map& map) { return kBody(map, call); });
  return checked(result);
}

template <auto kBody>
PyMethodDef entry(const char* name, const char* doc) {
  return method_entry<MapObject, locked_method<kBody>>(name, doc);
}

// ---- one key --------------------------------------------------------------------------------------------------------

[[noreturn]] void refuse_missing(PyObject* key) {
  const auto arguments = py::reinterpret_steal<py::object>(checked(PyTuple_Pack(1, key)));  // a key can be a tuple
  PyErr_SetObject(PyExc_KeyError, arguments.ptr());
  throw PythonError{};
}

[[noreturn]] void refuse_present(const char* function, PyObject* key) {
  fail(PyExc_ValueError, "%s: key %R is present, expected an absent key", function, key);
}

[[noreturn]] void refuse_empty(const char* function) { fail(empty_error(), "%s: the map is empty", function); }

Id present_id(const Map& map, PyObject* key) {
  const Found found(map, key);
  if (found.id == kNone) refuse_missing(key);
  return found.id;
}

PyObject* float_and_drop(double value, PyObject* key) {
  Py_DECREF(key);
  return PyFloat_FromDouble(value);
}

PyObject* take_first(Map& map) {
  const Id id = map.heap.top();
  const double priority = map.heap.priority(id);
  return pair_of(map.take(id), PyFloat_FromDouble(priority));
}

PyObject* push(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.push", {"key", "priority"}};
  const auto [key, priority_argument] = bind(kSignature, call);
  const double priority = to_number(kSignature.function, "priority", priority_argument);
  const Found found(map, key);
  if (found.id != kNone) refuse_present(kSignature.function, key);
  map.insert(key, found.hash, priority);
  Py_RETURN_NONE;
}

PyObject* update_priority(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.update_priority", {"key", "priority"}};
  const auto [key, priority_argument] = bind(kSignature, call);
  const double priority = to_number(kSignature.function, "priority", priority_argument);
  map.heap.update(present_id(map, key), priority);
  Py_RETURN_NONE;
}

// Whether float64 cannot hold the sum of two integers. Of other numbers it holds what IEEE 754 says.
bool is_rounded_sum(double a, double b, double sum) {
  if (std::abs(sum) < kAllIntegers || std::isinf(a)) return false;
  if (std::isinf(sum)) return true;
  // Knuth, TAOCP 4.2.2, theorem B: the error of the sum, exactly.
  const double of_b = sum - a;
  const double error = (a - (sum - of_b)) + (b - of_b);
  return error != 0 && std::trunc(a) == a;
}

PyObject* adjust(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.adjust", {"key", "delta"}};
  const auto [key, delta_argument] = bind(kSignature, call);
  const double delta = to_number(kSignature.function, "delta", delta_argument);
  const Id id = present_id(map, key);
  const double before = map.heap.priority(id);
  const double after = before + delta;
  if (after != after) {
    const py::float_ before_text(before), delta_text(delta);
    fail(PyExc_ValueError, "%s: the priority would be %R + %R, expected a number", kSignature.function,
         before_text.ptr(), delta_text.ptr());
  }
  if (is_rounded_sum(before, delta, after) && PyIndex_Check(delta_argument) && !PyFloat_Check(delta_argument)) {
    const py::float_ before_text(before);
    fail(PyExc_ValueError, "%s: the priority would be %R + %S, expected a sum that float64 can hold, or a float delta",
         kSignature.function, before_text.ptr(), delta_argument);
  }
  map.heap.update(id, after);
  return PyFloat_FromDouble(after + 0.0);
}

PyObject* discard(Map& map, Call call) {
  static constexpr Signature<1> kSignature = {"PriorityMap.discard", {"key"}};
  const Found found(map, bind(kSignature, call)[0]);
  if (found.id == kNone) Py_RETURN_FALSE;
  Py_DECREF(map.take(found.id));
  Py_RETURN_TRUE;
}

PyObject* get(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.get", {"key", "default"}, 1};
  const auto [key, otherwise] = bind(kSignature, call);
  const Found found(map, key);
  if (found.id == kNone) return Py_NewRef(otherwise == nullptr ? Py_None : otherwise);
  return PyFloat_FromDouble(map.heap.priority(found.id));
}

PyObject* set_default(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.setdefault", {"key", "default"}, 1};
  const auto [key, otherwise] = bind(kSignature, call);
  if (const Found found(map, key); found.id != kNone) return PyFloat_FromDouble(map.heap.priority(found.id));
  const double priority = to_number(kSignature.function, "default", otherwise == nullptr ? Py_None : otherwise);
  const Found found(map, key);  // anew: __float__ can have inserted it
  if (found.id != kNone) return PyFloat_FromDouble(map.heap.priority(found.id));
  map.insert(key, found.hash, priority);
  return PyFloat_FromDouble(priority + 0.0);
}

PyObject* pop(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.pop", {"key", "default"}, 1};
  const auto [key, otherwise] = bind(kSignature, call);
  const Found found(map, key);
  if (found.id == kNone) {
    if (otherwise == nullptr) refuse_missing(key);
    return Py_NewRef(otherwise);
  }
  const double priority = map.heap.priority(found.id);
  return float_and_drop(priority, map.take(found.id));
}

PyObject* popitem(Map& map, Call call) {
  no_arguments("PriorityMap.popitem", call);
  if (map.heap.empty()) refuse_empty("PriorityMap.popitem");
  return take_first(map);
}

PyObject* peekitem(Map& map, Call call) {
  no_arguments("PriorityMap.peekitem", call);
  if (map.heap.empty()) refuse_empty("PriorityMap.peekitem");
  const Id id = map.heap.top();
  return pair_of(Py_NewRef(map.keys.key(id)), PyFloat_FromDouble(map.heap.priority(id)));
}

PyObject* pushpop(Map& map, Call call) {
  static constexpr Signature<2> kSignature = {"PriorityMap.pushpop", {"key", "priority"}};
  const auto [key, priority_argument] = bind(kSignature, call);
  const double priority = to_number(kSignature.function, "priority", priority_argument);
  const Found found(map, key);
  if (found.id != kNone) refuse_present(kSignature.function, key);
  if (map.heap.precedes_all(priority)) return pair_of(Py_NewRef(key), PyFloat_FromDouble(priority + 0.0));
  map.insert(key, found.hash, priority);
  return take_first(map);
}

// ---- slots ----------------------------------------------------------------------------------------------------------

PyObject* make(PyTypeObject* type, PyObject*, PyObject*) {
  return guarded<PyObject*>(nullptr, [&] { return new_object(type); });
}

int initialize(PyObject* self, PyObject* arguments, PyObject* keywords) {
  static constexpr Signature<2> kSignature = {"PriorityMap", {"data", "max"}, 0, 1};
  return guarded(-1, [&] {
    const auto [data, max] = bind(kSignature, arguments, keywords);
    fill(self, kSignature.function, data, max != nullptr && to_bool(kSignature.function, "max", max));
    return 0;
  });
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Map* map = reinterpret_cast<MapObject*>(self)->map;
  return map == nullptr ? 0 : map->keys.for_each([&](PyObject* key, Id) { return visit(key, arg); });
}

int drop_references(PyObject* self) {
  if (reinterpret_cast<MapObject*>(self)->map == nullptr) return 0;
  Map& map = map_of(self);
  KeyTable keys;
  map.keys.swap(keys);
  map.heap.clear();
  return 0;
}

void free_map(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  delete std::exchange(reinterpret_cast<MapObject*>(self)->map, nullptr);
  type->tp_free(self);
  Py_DECREF(type);
}

Py_ssize_t length(PyObject* self) { return static_cast<Py_ssize_t>(map_of(self).keys.size()); }

int contains(PyObject* self, PyObject* key) {
  return locked(self, -1, [&](Map& map) { return Found(map, key).id != kNone ? 1 : 0; });
}

PyObject* get_item(PyObject* self, PyObject* key) {
  return locked<PyObject*>(self, nullptr,
                           [&](Map& map) { return PyFloat_FromDouble(map.heap.priority(present_id(map, key))); });
}

int set_item(PyObject* self, PyObject* key, PyObject* priority) {
  return locked(self, -1, [&](Map& map) {
    if (priority == nullptr) {
      Py_DECREF(map.take(present_id(map, key)));
    } else {
      upsert(map, key, to_number("PriorityMap.__setitem__", "priority", priority));
    }
    return 0;
  });
}

// Over a list of the keys, so that the map may change meanwhile.
PyObject* iterate(PyObject* self) {
  PyObject* keys = locked<PyObject*>(self, nullptr, [](Map& map) {
    py::list keys;
    map.keys.for_each([&](PyObject* key, Id) {
      keys.append(py::handle(key));
      return 0;
    });
    return keys.release().ptr();
  });
  if (keys == nullptr) return nullptr;
  PyObject* iterator = PyObject_GetIter(keys);
  Py_DECREF(keys);
  return iterator;
}

PyObject* get_max(PyObject* self, void*) { return PyBool_FromLong(map_of(self).heap.max()); }

PyObject* size_of(Map& map, Call call) {
  no_arguments("PriorityMap.__sizeof__", call);
  return PyLong_FromSize_t(sizeof(MapObject) + sizeof(Map) + map.keys.nbytes() + map.heap.nbytes());
}

// ---- tables ---------------------------------------------------------------------------------------------------------

PyMethodDef methods[] = {
    entry<push>("push", R"(push($self, key, priority)
--

Insert an absent key. ValueError when it is present.)"),
    entry<update_priority>("update_priority", R"(update_priority($self, key, priority)
--

Change the priority of a present key. KeyError when it is absent.)"),
    entry<adjust>("adjust", R"(adjust($self, key, delta)
--

Add to the priority of a present key and return the sum. KeyError when it is absent.)"),
    entry<discard>("discard", R"(discard($self, key)
--

Remove the key if it is present; return whether it was.)"),
    entry<get>("get", R"(get($self, key, default=None)
--

Return the priority of the key, or the default when it is absent.)"),
    entry<set_default>("setdefault", R"(setdefault($self, key, default=None)
--

Return the priority of the key, which is inserted with the default when it is absent.)"),
    entry<pop>("pop", R"(pop($self, key, default=<unrepresentable>)
--

Remove the key and return its priority. When it is absent, the default, or KeyError if there is none.)"),
    entry<popitem>("popitem", R"(popitem($self)
--

Remove the first key and return (key, priority). Empty when there is none.)"),
    entry<peekitem>("peekitem", R"(peekitem($self)
--

Return the first key as (key, priority) and leave it. Empty when there is none.)"),
    entry<pushpop>("pushpop", R"(pushpop($self, key, priority)
--

Insert an absent key, then remove the first and return it as (key, priority). ValueError when the key is present.)"),
    method_entry<MapObject, clear>("clear", R"(clear($self)
--

Remove all keys.)"),
    method_entry<MapObject, copy>("copy", R"(copy($self)
--

Return another map with the same contents in the same order.)"),
    method_entry<MapObject, copy>("__copy__", "__copy__($self)\n--\n\n"),
    entry<items>("_items", "_items($self)\n--\n\nReturn a list of (key, priority), by age."),
    entry<get_state>("__getstate__", "__getstate__($self)\n--\n\n"),
    method_entry<MapObject, set_state>("__setstate__", "__setstate__($self, state)\n--\n\n"),
    entry<size_of>("__sizeof__", "__sizeof__($self)\n--\n\n"),
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "PriorityMap[KeyT], for annotations."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"max", get_max, nullptr, "Whether the largest priority comes first.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

void bind_priority_map(py::module_& module) {
  PyType_Slot slots[] = {
      {Py_tp_doc,
       const_cast<char*>("PriorityMap(data=(), /, *, max=False)\n--\n\nThe native half of foveal.PriorityMap.")},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      slot(Py_tp_new, make),
      slot(Py_tp_init, initialize),
      slot(Py_tp_traverse, traverse),
      slot(Py_tp_clear, drop_references),
      slot(Py_tp_dealloc, free_map),
      slot(Py_tp_iter, iterate),
      slot(Py_sq_contains, contains),
      slot(Py_mp_length, length),
      slot(Py_mp_subscript, get_item),
      slot(Py_mp_ass_subscript, set_item),
      {0, nullptr},
  };
  PyType_Spec spec = {"foveal._core.PriorityMap", sizeof(MapObject), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
  add_type(module, spec);
}

}  // namespace foveal
