#include "foveal/sum_tree.h"

#include <pybind11/numpy.h>

#include <cmath>
#include <memory>
#include <string>

#include "bindings/batch.h"
#include "bindings/fork_aware_lock.h"
#include "bindings/gil.h"
#include "bindings/native_type.h"
#include "bindings/sum_tree.h"

namespace py = pybind11;

namespace foveal {
namespace {

struct Tree {
  SumTree sums;
  ForkAwareLock lock;
};

struct TreeObject {
  PyObject_HEAD Tree* tree;
};

// Runs `body(sums)` alone. With the GIL, unless `work` elements make it worth to let it go.
template <class Body>
void alone(TreeObject& self, size_t work, Body&& body) {
  Tree& tree = *self.tree;
  ForkAwareLock::Taken taken;
  while ((taken = tree.lock.try_lock()) == ForkAwareLock::Taken::kNot) {
    const ReleasedGil released;
    tree.lock.wait();
  }
  // The weights are whole, one by one, or noted; the sums need not be.
  if (taken == ForkAwareLock::Taken::kOrphaned) tree.sums.rebuild();
  try {
    // Unlocked before the GIL is asked for: where the interpreter has ended, that does not return.
    without_gil(work, [&] {
      body(tree.sums);
      tree.lock.unlock();
    });
  } catch (const std::exception&) {
    tree.lock.unlock();
    throw;
  }
}

// ---- arguments ------------------------------------------------------------------------------------------------------

int64_t to_id(const char* function, PyObject* object, const SumTree& sums) {
  const int64_t id = to_int64(function, "id", object);
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(sums.capacity())) {
    fail(PyExc_IndexError, "%s: id is %S, expected 0 to %lld", function, object,
         static_cast<long long>(sums.capacity() - 1));
  }
  return id;
}

bool is_weight(double number, double most) { return 0 <= number && number <= most; }

[[noreturn]] void refuse_weight(const char* function, const std::string& name, double found, const SumTree& sums) {
  const py::float_ found_text(found), most_text(sums.max_weight());
  fail(PyExc_ValueError, "%s: %s is %R, expected 0 to %R", function, name.c_str(), found_text.ptr(), most_text.ptr());
}

// k numbers of rng.random(k), in [0, 1).
Batch<double> draw_points(const char* function, PyObject* rng, int64_t k) {
  const auto method = py::reinterpret_steal<py::object>(PyObject_GetAttrString(rng, "random"));
  if (!method) {
    fail(PyExc_TypeError, "%s: rng has type %s, expected a numpy.random.Generator", function, Py_TYPE(rng)->tp_name);
  }
  const auto numbers = py::reinterpret_steal<py::object>(
      checked(asking_for_gil([&] { return PyObject_CallFunction(method.ptr(), "L", static_cast<long long>(k)); })));
  Batch<double> points = read_numbers(function, "rng.random(k)", numbers, static_cast<size_t>(k));
  for (size_t i = 0; i < points.count; ++i) {
    if (!(0 <= points[i] && points[i] < 1)) {
      fail(PyExc_ValueError, "%s: rng.random(k) holds a number outside [0, 1)", function);
    }
  }
  return points;
}

// ---- methods --------------------------------------------------------------------------------------------------------

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static constexpr Signature<1> kSignature = {"SumTree", {"capacity"}};
  return guarded<PyObject*>(nullptr, [&] {
    const int64_t capacity = to_capacity("SumTree", bind(kSignature, arguments, keywords)[0], SumTree::kMaxCapacity);
    auto tree = std::unique_ptr<Tree>(new Tree{SumTree(capacity), {}});
    PyObject* object = checked(type->tp_alloc(type, 0));
    reinterpret_cast<TreeObject*>(object)->tree = tree.release();
    return object;
  });
}

PyObject* update_many(TreeObject& self, Call call) {
  static constexpr Signature<2> kSignature = {"SumTree.update_many", {"ids", "weights"}};
  const auto bound = bind(kSignature, call);
  const SumTree& sums = self.tree->sums;
  const Batch<int64_t> ids = read_ids(kSignature.function, "ids", bound[0], sums.capacity());
  const Batch<double> weights = read_numbers(kSignature.function, "weights", bound[1], ids.count);
  const double most = sums.max_weight();
  for (size_t i = 0; i < weights.count; ++i) {
    if (is_weight(weights[i], most)) continue;
    refuse_weight(kSignature.function, "weights[" + std::to_string(i) + "]", weights[i], sums);
  }
  alone(self, ids.count, [&](SumTree& tree) { tree.set_many(ids.span(), weights.span()); });
  Py_RETURN_NONE;
}

struct Sample {
  std::unique_ptr<int64_t[]> ids;
  std::unique_ptr<double[]> probabilities;
  size_t count;

  explicit Sample(size_t k)
      : ids(std::make_unique_for_overwrite<int64_t[]>(k)),
        probabilities(std::make_unique_for_overwrite<double[]>(k)),
        count(k) {}

  std::span<int64_t> id_span() const { return {ids.get(), count}; }
  std::span<double> probability_span() const { return {probabilities.get(), count}; }
};

// The sample goes to the i-th of `k` equal shares of the total, or anywhere.
void draw(const SumTree& sums, std::span<double> points, bool stratified, const Sample& sample) {
  const double total = sums.total();
  const auto count = static_cast<double>(points.size());
  for (size_t i = 0; i < points.size(); ++i) {
    points[i] = (stratified ? (static_cast<double>(i) + points[i]) / count : points[i]) * total;
  }
  sums.find_many(points, sample.id_span());
  for (size_t i = 0; i < points.size(); ++i) sample.probabilities[i] = sums[sample.ids[i]] / total;
}

PyObject* sample(TreeObject& self, Call call) {
  static constexpr Signature<4> kSignature = {"SumTree.sample", {"k", "rng", "replace", "stratified"}, 2, 1};
  const auto [k_argument, rng, replace_argument, stratified_argument] = bind(kSignature, call);
  const int64_t k = to_int64(kSignature.function, "k", k_argument);
  if (k < 0) fail(PyExc_ValueError, "%s: k is %S, expected at least 0", kSignature.function, k_argument);
  const bool replace = replace_argument == nullptr || to_bool(kSignature.function, "replace", replace_argument);
  const bool stratified =
      stratified_argument != nullptr && to_bool(kSignature.function, "stratified", stratified_argument);
  if (stratified && !replace) {
    fail(PyExc_ValueError, "%s: stratified is True, expected False with replace=False", kSignature.function);
  }
  int64_t positive = 0;
  const auto refuse_k = [&] {
    fail(PyExc_ValueError, "%s: k is %S, expected at most %lld, the number of positive weights", kSignature.function,
         k_argument, static_cast<long long>(positive));
  };
  if (!replace) {  // before so much is allocated
    alone(self, 1, [&](SumTree& sums) { positive = sums.num_positive(); });
    if (k > positive) refuse_k();
  }
  const Batch<double> points = draw_points(kSignature.function, rng, k);
  const Sample sample(points.count);
  bool enough = false;
  alone(self, points.count, [&](SumTree& sums) {
    positive = sums.num_positive();
    enough = replace ? k == 0 || sums.total() > 0 : k <= positive;
    if (!enough) return;
    if (replace) {
      draw(sums, {points.values.get(), points.count}, stratified, sample);
    } else {
      sums.draw_without_replacement(points.span(), sample.id_span(), sample.probability_span());
    }
  });
  if (!enough && replace) {
    fail(PyExc_ValueError, "%s: all weights are 0, expected a positive one", kSignature.function);
  }
  if (!enough) refuse_k();
  PyObject* ids = to_array(sample.id_span());
  return pair_of(ids, to_array(sample.probability_span()));
}

PyObject* weights(TreeObject& self, Call call) {
  no_arguments("SumTree.weights", call);
  const auto capacity = static_cast<size_t>(self.tree->sums.capacity());
  const auto copy = std::make_unique_for_overwrite<double[]>(capacity);
  alone(self, capacity, [&](SumTree& sums) { std::copy_n(sums.weights().data(), capacity, copy.get()); });
  return to_array(std::span<const double>(copy.get(), capacity));
}

PyObject* size_of(TreeObject& self, Call call) {
  no_arguments("SumTree.__sizeof__", call);
  return PyLong_FromSize_t(static_cast<size_t>(Py_TYPE(&self)->tp_basicsize) + sizeof(Tree) +
                           static_cast<size_t>(self.tree->sums.nbytes()));
}

// ---- slots ----------------------------------------------------------------------------------------------------------

TreeObject& tree_of(PyObject* self) { return *reinterpret_cast<TreeObject*>(self); }

void free_tree(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete tree_of(self).tree;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* get_item(PyObject* self, PyObject* key) {
  return guarded<PyObject*>(nullptr, [&] {
    const int64_t id = to_id("SumTree.__getitem__", key, tree_of(self).tree->sums);
    double weight = 0;
    alone(tree_of(self), 1, [&](SumTree& sums) { weight = sums[id]; });
    return PyFloat_FromDouble(weight);
  });
}

int set_item(PyObject* self, PyObject* key, PyObject* value) {
  static constexpr const char* kFunction = "SumTree.__setitem__";
  return guarded(-1, [&] {
    const SumTree& sums = tree_of(self).tree->sums;
    const int64_t id = to_id(kFunction, key, sums);
    if (value == nullptr) fail(PyExc_TypeError, "SumTree: an id cannot be deleted, expected a weight of 0");
    const double weight = to_number(kFunction, "weight", value);
    if (!is_weight(weight, sums.max_weight())) refuse_weight(kFunction, "weight", weight, sums);
    alone(tree_of(self), 1, [&](SumTree& tree) { tree.set(id, weight); });
    return 0;
  });
}

PyObject* get_capacity(PyObject* self, void*) { return PyLong_FromLongLong(tree_of(self).tree->sums.capacity()); }

PyObject* get_total(PyObject* self, void*) {
  return guarded<PyObject*>(nullptr, [&] {
    double total = 0;
    alone(tree_of(self), 1, [&](SumTree& sums) { total = sums.total(); });
    return PyFloat_FromDouble(total);
  });
}

PyMethodDef methods[] = {
    method_entry<TreeObject, update_many>("update_many", R"(update_many($self, ids, weights)
--

Set many weights; of duplicate ids the last counts.

Parameters
----------
ids : (n,) int32 or int64
weights : (n,) float32 or float64)"),
    method_entry<TreeObject, sample>("sample", R"(sample($self, k, *, rng, replace=True, stratified=False)
--

Draw ids in proportion to their weights.

Parameters
----------
k : int
    How many.
rng : numpy.random.Generator
    `rng.random(k)` is called once.
replace : bool
    False: in sequence, each of them once.
stratified : bool
    The i-th comes from the i-th of k equal shares of the total, which makes the sample more even. With replacement only.

Returns
-------
ids : (k,) int64
probabilities : (k,) float64
    weight / total at the draw: without replacement the total of what was left.

Raises
------
ValueError
    There is no positive weight, or without replacement fewer than k.)"),
    method_entry<TreeObject, weights>("weights", R"(weights($self)
--

Return a copy of all weights, (capacity,) float64.)"),
    method_entry<TreeObject, size_of>("__sizeof__", "__sizeof__($self)\n--\n\n"),
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"capacity", get_capacity, nullptr, "How many ids there are.", nullptr},
    {"total", get_total, nullptr, "The sum of all weights.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

void bind_sum_tree(py::module_& module) {
  ForkAwareLock::watch_forks();
  module.def(
      "check_not_rounded",
      [](const char* function, const char* name, py::handle source, const py::array& array) {
        guarded_call([&] { check_not_rounded(function, name, source, array); });
      },
      py::arg("function"), py::arg("name"), py::arg("source"), py::arg("array"), py::pos_only(),
      "ValueError for an integer in an array, or in the tuple that it was made of, that float64 would round.");
  PyType_Slot slots[] = {
      {Py_tp_doc, const_cast<char*>("SumTree(capacity)\n--\n\nThe native half of foveal.SumTree.")},
      {Py_tp_methods, methods},
      {Py_tp_getset, properties},
      slot(Py_tp_new, make),
      slot(Py_tp_dealloc, free_tree),
      slot(Py_mp_subscript, get_item),
      slot(Py_mp_ass_subscript, set_item),
      {0, nullptr},
  };
  PyType_Spec spec = {"foveal._core.SumTree", sizeof(TreeObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  add_type(module, spec);
}

}  // namespace foveal
