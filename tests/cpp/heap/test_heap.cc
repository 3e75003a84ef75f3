// IndexedHeap in one thread: every operation against a plain model at sizes around the fan-out, the tree that it
// leaves, the limits, the batches, the relaxed pop's distance from the front.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "foveal/indexed_heap.h"

namespace {

using foveal::BasicIndexedHeap;
using foveal::HeapEntry;
using foveal::HeapWord;
using foveal::IndexedHeap;
using foveal::NativeAtomics;
using foveal::Order;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class Model {
 public:
  explicit Model(Order order) : order_(order) {}

  std::optional<HeapEntry> first() const {
    std::optional<HeapEntry> best;
    for (const auto& [id, priority] : of_) {
      if (!best || (order_ == Order::kMin ? priority < best->priority : priority > best->priority))
        best = {id, priority};
    }
    return best;
  }
  std::optional<double> at(int64_t id) const {
    const auto found = of_.find(id);
    return found == of_.end() ? std::nullopt : std::optional(found->second);
  }
  std::map<int64_t, double>& entries() { return of_; }

 private:
  Order order_;
  std::map<int64_t, double> of_;
};

template <int kLogFanout>
void test_against_model(int64_t capacity, Order order, int steps) {
  BasicIndexedHeap<NativeAtomics, kLogFanout> heap(capacity, order);
  Model model(order);
  std::mt19937_64 random(static_cast<uint64_t>(capacity));
  uint64_t state = 1;
  for (int i = 0; i < steps; ++i) {
    const int64_t id = static_cast<int64_t>(random() % static_cast<uint64_t>(capacity));
    const double priority =
        random() % 40 == 0 ? (random() % 2 != 0 ? kInfinity : -kInfinity) : static_cast<double>(random() % 50) - 20;
    const std::optional<double> before = model.at(id);
    const std::optional<HeapEntry> first = random() % 4 == 0 ? model.first() : std::nullopt;
    switch (random() % 10) {
      case 0:
        FOVEAL_CHECK(heap.push(id, priority) == !before);
        if (!before) model.entries()[id] = priority;
        break;
      case 1:
      case 2:
        FOVEAL_CHECK(heap.update(id, priority) == before.has_value());
        if (before) model.entries()[id] = priority;
        break;
      case 3:
        FOVEAL_CHECK(heap.upsert(id, priority) == before.has_value());
        model.entries()[id] = priority;
        break;
      case 4:
        FOVEAL_CHECK(heap.remove(id) == before);
        model.entries().erase(id);
        break;
      case 5:
        FOVEAL_CHECK(heap.priority(id) == before);
        FOVEAL_CHECK(heap.contains(id) == before.has_value());
        break;
      case 6:
        if (!first) break;
        FOVEAL_CHECK(heap.pop() == first);
        model.entries().erase(first->id);
        break;
      case 7:
        if (first) FOVEAL_CHECK(heap.peek() == first);
        break;
      case 8:
        if (!first) break;
        FOVEAL_CHECK(heap.pop_push(priority) == first);
        model.entries()[first->id] = priority;
        break;
      case 9: {
        if (!first) break;
        const std::optional<HeapEntry> any = heap.pop_relaxed(state);
        FOVEAL_CHECK(any && model.at(any->id) == any->priority);
        model.entries().erase(any->id);
        break;
      }
    }
    FOVEAL_CHECK(heap.size() == static_cast<int64_t>(model.entries().size()));
  }
  while (const std::optional<HeapEntry> first = model.first()) {
    FOVEAL_CHECK(heap.pop() == first);
    model.entries().erase(first->id);
  }
  FOVEAL_CHECK(!heap.pop() && !heap.peek() && !heap.pop_push(1) && !heap.pop_relaxed(state));
}

// Whether every node is a copy of its smallest child, and bears a mark or not as `may_be_marked` says.
template <class Heap>
bool tree_is_exact(const Heap& heap, int log_fanout, bool may_be_marked = false) {
  const auto& tree = heap.tree();
  using Tree = std::remove_cvref_t<decltype(tree)>;
  if (!may_be_marked) {
    for (int64_t id = 0; id < heap.capacity(); ++id) {
      if ((tree.leaf(id).tag & (Tree::kDirty | Tree::kClaim)) != 0) return false;
    }
  }
  for (int level = 1; level <= tree.root_level(); ++level) {
    for (int64_t i = 0; i < tree.size(level); ++i) {
      const HeapWord node = tree.node(level, i);
      if (!may_be_marked && (node.tag & Tree::kDirty) != 0) return false;
      uint64_t smallest = Tree::kAbsent;
      for (int64_t child = i << log_fanout; child < std::min((i + 1) << log_fanout, tree.size(level - 1)); ++child) {
        smallest = std::min(smallest, tree.node(level - 1, child).key);
      }
      if (node.key != smallest) return false;
      if (node.key != Tree::kAbsent && tree.leaf(tree.id_of(node)).key != node.key) return false;
    }
  }
  return true;
}

// No thread but one: no stale copy is left anywhere, and no mark. (Others may leave copies for `help`.)
template <int kLogFanout>
void test_tree_is_exact(int64_t capacity) {
  BasicIndexedHeap<NativeAtomics, kLogFanout> heap(capacity);
  std::mt19937 random(6);
  uint64_t state = 1;
  for (int i = 0; i < 3000; ++i) {
    const int64_t id = static_cast<int64_t>(random() % static_cast<uint64_t>(capacity));
    const double priority = random() % 50;
    switch (random() % 8) {
      case 0:
        heap.push(id, priority);
        break;
      case 1:
        heap.update(id, priority);
        break;
      case 2:
        heap.remove(id);
        break;
      case 3:
        heap.pop();
        break;
      case 4:
        heap.pop_push(priority);
        break;
      case 5:
        heap.pop_relaxed(state);
        break;
      default:
        heap.upsert(id, priority);
        break;
    }
    FOVEAL_CHECK(tree_is_exact(heap, kLogFanout));
  }
}

struct Abandoned {};

// Gives up for ever before the access that `steps_left` counts down to.
struct AbandoningAtomics : NativeAtomics {
  static inline int64_t steps_left = -1;

  static void step() {
    if (steps_left >= 0 && steps_left-- == 0) throw Abandoned();
  }
  static HeapWord load(const HeapWord& word) { return step(), NativeAtomics::load(word); }
  static uint64_t load_key(const HeapWord& word) { return step(), NativeAtomics::load_key(word); }
  static bool compare_exchange(HeapWord& word, HeapWord expected, HeapWord desired) {
    return step(), NativeAtomics::compare_exchange(word, expected, desired);
  }
  static bool compare_exchange_tag(HeapWord& word, HeapWord expected, uint64_t tag) {
    return step(), NativeAtomics::compare_exchange_tag(word, expected, tag);
  }
};

// An update that was broken off anywhere leaves the leaf marked and copies of its key on the way up. Who then removes
// or raises that element replaces them all.
template <int kLogFanout, class Change>
void test_tree_is_exact_after_an_abandoned_update(Change change) {
  int64_t step = 0;
  for (bool abandoned = true; abandoned; ++step) {
    BasicIndexedHeap<AbandoningAtomics, kLogFanout> heap(100, Order::kMin, 0, 2);
    for (int64_t id = 0; id < 100; ++id) heap.push(id, 10);
    AbandoningAtomics::steps_left = step;
    try {
      heap.update(37, 1);
      abandoned = false;
    } catch (const Abandoned&) {
    }
    AbandoningAtomics::steps_left = -1;
    change(heap);
    FOVEAL_CHECK(tree_is_exact(heap, kLogFanout, true));
    FOVEAL_CHECK(heap.peek() == (HeapEntry{0, 10}));
  }
  FOVEAL_CHECK(step > 10);
}

template <int kLogFanout>
void test_abandoned_updates() {
  test_tree_is_exact_after_an_abandoned_update<kLogFanout>([](auto& heap) { heap.remove(37); });
  test_tree_is_exact_after_an_abandoned_update<kLogFanout>([](auto& heap) { heap.update(37, 20); });
}

void test_limits() {
  for (const int64_t capacity : {int64_t{0}, int64_t{-1}, IndexedHeap::kMaxCapacity + 1}) {
    bool refused = false;
    try {
      const IndexedHeap heap(capacity);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    FOVEAL_CHECK(refused);
  }
  for (const int64_t capacity : {1000, 4097, 100'000}) {
    FOVEAL_CHECK(IndexedHeap(capacity).nbytes() <= 24 * capacity);
  }
}

void test_special_priorities() {
  for (const Order order : {Order::kMin, Order::kMax}) {
    IndexedHeap heap(8, order);
    const double sign = order == Order::kMin ? 1 : -1;
    const double values[] = {kInfinity, 0.0,  -0.0, -kInfinity, std::numeric_limits<double>::denorm_min(),
                             -1e308,    1e308};
    for (int64_t id = 0; id < 7; ++id) heap.push(id, sign * values[id]);
    FOVEAL_CHECK(!std::signbit(*heap.priority(2)));  // -0.0 comes back as 0.0
    for (const int64_t id : {3, 5, 1, 2, 4, 6, 0}) FOVEAL_CHECK(heap.pop()->id == id);
  }
}

// Equal priorities leave by lowest id, whatever the stripes and however they came in.
void test_ties() {
  for (const int64_t capacity : {5, 64, 1000, 5000}) {
    IndexedHeap heap(capacity);
    std::vector<int64_t> ids(capacity);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
    for (const int64_t id : ids) heap.push(id, id % 3 == 0 ? 1.0 : 2.0);
    for (const int64_t id : ids) heap.update(id, 1.0);
    for (int64_t id = 0; id < capacity; ++id) FOVEAL_CHECK(heap.pop()->id == id);
  }
}

void test_batches() {
  constexpr int64_t kCapacity = 3000;
  IndexedHeap heap(kCapacity);
  std::mt19937_64 random(3);
  std::vector<int64_t> ids(kCapacity / 2);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(2 * i);
  std::vector<double> priorities(ids.size());
  for (double& priority : priorities) priority = static_cast<double>(random() % 1000);
  heap.assign(ids, priorities);
  FOVEAL_CHECK(heap.size() == static_cast<int64_t>(ids.size()));
  FOVEAL_CHECK(heap.find_absent(ids) == ids.size() && heap.find_present(ids) == 0);
  const std::vector<int64_t> mixed = {0, 2, 5, 4, 7};
  FOVEAL_CHECK(heap.find_absent(mixed) == 2 && heap.find_present(std::span(mixed).subspan(2)) == 1);
  FOVEAL_CHECK(heap.find_absent({}) == 0 && heap.find_present({}) == 0);

  std::vector<size_t> skipped;
  const auto note = [&skipped](size_t i) { skipped.push_back(i); };
  const std::vector<int64_t> batch = {0, 1, 2, 1, 2998, 0};
  const std::vector<double> values = {-1, -2, -3, -4, -5, -6};
  heap.update_many(batch, values, note);
  FOVEAL_CHECK((skipped == std::vector<size_t>{1, 3}));
  FOVEAL_CHECK(heap.priority(0) == -6 && heap.priority(2) == -3 && !heap.contains(1));
  skipped.clear();
  heap.push_many(batch, values, note);
  FOVEAL_CHECK((skipped == std::vector<size_t>{0, 2, 3, 4, 5}));
  FOVEAL_CHECK(heap.priority(1) == -2 && heap.size() == static_cast<int64_t>(ids.size()) + 1);
  heap.upsert_many(batch, values);
  FOVEAL_CHECK(heap.priority(1) == -4 && heap.size() == static_cast<int64_t>(ids.size()) + 1);

  std::vector<int64_t> popped(4);
  std::vector<double> of(4);
  FOVEAL_CHECK(heap.pop_many(popped, of) == 4);
  FOVEAL_CHECK((popped == std::vector<int64_t>{0, 2998, 1, 2}) && (of == std::vector<double>{-6, -5, -4, -3}));
  popped.resize(kCapacity);
  of.resize(kCapacity);
  FOVEAL_CHECK(heap.pop_many(popped, of) == ids.size() + 1 - 4);
  FOVEAL_CHECK(std::is_sorted(of.begin(), of.begin() + static_cast<std::ptrdiff_t>(ids.size()) - 3));
  FOVEAL_CHECK(heap.size() == 0 && heap.pop_many(popped, of) == 0);

  heap.assign(batch, values);
  FOVEAL_CHECK(heap.size() == 4 && heap.priority(0) == -6 && heap.priority(1) == -4);
  heap.clear();
  FOVEAL_CHECK(heap.size() == 0 && !heap.peek());
}

// Mean number of smaller elements left behind by a relaxed pop.
double mean_rank(std::vector<double> priorities) {
  const int64_t n = static_cast<int64_t>(priorities.size());
  IndexedHeap heap(n);
  std::vector<int64_t> ids(n);
  std::iota(ids.begin(), ids.end(), 0);
  heap.assign(ids, priorities);
  uint64_t state = 1;
  double sum = 0;
  const int64_t pops = n / 10;
  for (int64_t i = 0; i < pops; ++i) {
    const HeapEntry entry = *heap.pop_relaxed(state);
    for (const double priority : priorities) sum += priority < entry.priority;
    priorities[static_cast<size_t>(entry.id)] = kInfinity;
  }
  return sum / static_cast<double>(pops);
}

void test_relaxed_rank() {
  constexpr int64_t kCount = 4096;
  std::vector<double> random(kCount), rising(kCount);
  std::mt19937_64 generator(4);
  for (double& priority : random) priority = static_cast<double>(generator());
  std::iota(rising.begin(), rising.end(), 0.0);
  const double subtrees = static_cast<double>(IndexedHeap(kCount).relaxed_subtrees());
  const double of_random = mean_rank(random), of_rising = mean_rank(rising);
  std::printf(
      "relaxed pop, %g subtrees: mean rank %.1f for random priorities, %.1f for priorities that rise with the id\n",
      subtrees, of_random, of_rising);
  FOVEAL_CHECK(of_random > 0 && of_random < 2 * subtrees);
  FOVEAL_CHECK(of_rising < 2 * subtrees);
}

}  // namespace

int main() {
  for (const int64_t capacity : {1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 130, 300}) {
    for (const Order order : {Order::kMin, Order::kMax}) {
      test_against_model<3>(capacity, order, 30'000);
      test_against_model<1>(capacity, order, 10'000);
    }
  }
  test_against_model<3>(5000, Order::kMin, 30'000);
  for (const int64_t capacity : {1, 8, 9, 65, 130, 600}) {
    test_tree_is_exact<1>(capacity);
    test_tree_is_exact<3>(capacity);
  }
  test_abandoned_updates<1>();
  test_abandoned_updates<3>();
  test_limits();
  test_special_priorities();
  test_ties();
  test_batches();
  test_relaxed_rank();
  return foveal_test::result();
}
