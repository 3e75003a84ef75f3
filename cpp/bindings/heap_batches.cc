// The batches of an IndexedHeap: many ids in one call, without the GIL.
#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "bindings/heap_object.h"

namespace foveal {
namespace {

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

}  // namespace

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

}  // namespace foveal
