// A lock-free indexed priority heap: ids 0 .. capacity-1, each absent or present with a priority that may change at any
// time.
//
// Any number of threads may call push, update, upsert, remove, priority, peek, pop and their batches at once; each call
// (in a batch, each element) is linearizable. The tree under it and the sources are in heap_tree.h; linearization
// points, memory orders, the progress of each operation and what is NOT guaranteed are in docs/concurrency.md.
//
// Order: smallest priority first (Order::kMax: largest), equal priorities by lowest id. -0.0 equals 0.0, infinities are
// fine. Preconditions, asserted in debug builds: 0 <= id < capacity, priority is not NaN.
// Cost: peek O(1), the others O(log8 capacity); most updates touch one or two levels. 18.3 bytes an id. No allocation
// after construction.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "foveal/heap_tree.h"

namespace foveal {

enum class Order : uint8_t { kMin, kMax };

struct HeapEntry {
  int64_t id;
  double priority;

  bool operator==(const HeapEntry&) const = default;
};

template <class Atomics = NativeAtomics, int kLogFanout = 3>
class BasicIndexedHeap {
  using Tree = HeapTree<Atomics, kLogFanout>;
  using Memory = typename Atomics::Memory;
  static constexpr uint64_t kAbsent = Tree::kAbsent;

 public:
  static constexpr int64_t kMaxCapacity = Tree::kMaxCapacity;

  explicit BasicIndexedHeap(int64_t capacity, Order order = Order::kMin)
      : BasicIndexedHeap(capacity, order, default_log_stripes(capacity), kMinSubtrees) {}

  // For tests: a certain number of stripes (see HeapTree), and of subtrees for pop_relaxed, at a small capacity.
  BasicIndexedHeap(int64_t capacity, Order order, int log_stripes, int64_t min_subtrees)
      : tree_(checked(capacity), log_stripes), capacity_(capacity), flip_(order == Order::kMax ? ~uint64_t{0} : 0) {
    while (sample_level_ < tree_.root_level() && tree_.size(sample_level_ + 1) >= min_subtrees) ++sample_level_;
  }

  BasicIndexedHeap(const BasicIndexedHeap&) = delete;
  BasicIndexedHeap& operator=(const BasicIndexedHeap&) = delete;

  int64_t capacity() const { return capacity_; }
  Order order() const { return flip_ != 0 ? Order::kMax : Order::kMin; }
  int64_t nbytes() const { return tree_.nbytes(); }

  // The number of present ids; while other threads write, some number near it, off by at most 64 for each of them.
  int64_t size() const {
    int64_t sum = 0;
    for (const Counter& counter : counters_) sum += counter.value.load(std::memory_order_relaxed);
    return sum > 0 ? sum : 0;
  }

  // Inserts an absent id; false, and nothing changed, when it was present.
  bool push(int64_t id, double priority) {
    tree_.prefetch(at(id));
    if (write<Write::kInsert>(id, key_of(priority))) return false;
    count(1);
    return true;
  }

  // Changes the priority of a present id; false when it was absent.
  bool update(int64_t id, double priority) {
    tree_.prefetch(at(id));
    return write<Write::kUpdate>(id, key_of(priority));
  }

  // Inserts or changes; returns whether the id was present.
  bool upsert(int64_t id, double priority) {
    tree_.prefetch(at(id));
    const bool present = write<Write::kUpsert>(id, key_of(priority));
    if (!present) count(1);
    return present;
  }

  // The priority that the id had, or none when it was absent.
  std::optional<double> remove(int64_t id) {
    HeapWord& leaf = tree_.leaf(at(id));
    Memory memory;
    for (;;) {
      memory.forget_all_but();
      const HeapWord seen = Atomics::load(leaf);
      if (seen.key == kAbsent) return std::nullopt;
      if (take(leaf, id, seen)) {
        count(-1);
        return priority_of(seen.key);
      }
    }
  }

  std::optional<double> priority(int64_t id) {
    HeapWord& leaf = tree_.leaf(at(id));
    Memory memory;
    for (;;) {
      memory.forget_all_but();
      const HeapWord seen = Atomics::load(leaf);
      if (seen.key == kAbsent) return std::nullopt;
      if (is_dirty(seen)) {
        settle(leaf, id, seen);
        continue;
      }
      if (is_claimed(seen)) {
        // A pop may already have decided on this element. If the root still holds it, the pop has not: the element is
        // present. Else take the claim away, so that the pop has to begin anew.
        if (tree_.holds(Atomics::load(tree_.root()), seen.key, id)) {
          if (Atomics::load(leaf) != seen) continue;
        } else if (!Atomics::compare_exchange_tag(leaf, seen, (seen.tag & ~Tree::kClaim) + Tree::kLeafVersion)) {
          continue;
        }
      }
      return priority_of(seen.key);
    }
  }

  bool contains(int64_t id) { return priority(id).has_value(); }

  // The place in `ids` of the first that is absent, or present, each looked at in its turn; ids.size() if there is
  // none. An element that is on its way in or out may count as present.
  size_t find_absent(std::span<const int64_t> ids) const {
    return find(ids, [this](int64_t id) { return is_vacant(id); });
  }
  size_t find_present(std::span<const int64_t> ids) {
    return find(ids, [this](int64_t id) { return !is_vacant(id) && contains(id); });
  }

  std::optional<HeapEntry> peek() {
    Memory memory;
    for (;;) {
      memory.forget_all_but();
      const HeapWord root = Atomics::load(tree_.root());
      if (root.key == kAbsent) return std::nullopt;
      const int64_t id = tree_.id_of(root);
      HeapWord& leaf = tree_.leaf(id);
      const HeapWord seen = Atomics::load(leaf);
      if (seen.key != root.key) {
        tree_.help(id, root.key);
      } else if (is_dirty(seen)) {
        settle(leaf, id, seen);
      } else if (tree_.holds(Atomics::load(tree_.root()), root.key, id)) {
        return HeapEntry{id, priority_of(root.key)};
      }
    }
  }

  std::optional<HeapEntry> pop() { return counted(take_first()); }

  // Takes the first element and puts the same id back with another priority: a pop, then a push. Cheaper than the two
  // calls, but no less than two operations: another thread may act between them.
  std::optional<HeapEntry> pop_push(double priority) {
    const uint64_t key = key_of(priority);
    return change_first(
        [this, key](HeapWord& leaf, int64_t id, HeapWord seen) { return replace(leaf, id, seen, key); });
  }

  // Takes the better of the first elements of two random subtrees. How far from the front that is grows with the number
  // of subtrees, `relaxed_subtrees()`; threads that pop so do not contend. `state` is the caller's random state (any
  // value to start with, one for each thread). None only when the heap was empty.
  std::optional<HeapEntry> pop_relaxed(uint64_t& state) { return counted(take_relaxed(state)); }
  int64_t relaxed_subtrees() const { return tree_.size(sample_level_); }

  // Batches: element by element in order, so of duplicate ids the last counts. `skipped(i)` is called for each element
  // that changed nothing: a present one of push_many, an absent one of update_many.
  template <class Skipped>
  void push_many(std::span<const int64_t> ids, std::span<const double> priorities, Skipped&& skipped) {
    write_many<Write::kInsert>(ids, priorities, skipped);
  }
  template <class Skipped>
  void update_many(std::span<const int64_t> ids, std::span<const double> priorities, Skipped&& skipped) {
    write_many<Write::kUpdate>(ids, priorities, skipped);
  }
  void upsert_many(std::span<const int64_t> ids, std::span<const double> priorities) {
    write_many<Write::kUpsert>(ids, priorities, [](size_t) {});
  }

  // Pops until both spans are full or the heap is empty; returns how many. In order, unless others write meanwhile.
  size_t pop_many(std::span<int64_t> ids, std::span<double> priorities) {
    return pop_many(ids, priorities, [this] { return take_first(); });
  }
  size_t pop_many_relaxed(std::span<int64_t> ids, std::span<double> priorities, uint64_t& state) {
    return pop_many(ids, priorities, [this, &state] { return take_relaxed(state); });
  }

  // Replaces the contents, in O(capacity). Of duplicate ids the last counts. The caller is alone.
  void assign(std::span<const int64_t> ids, std::span<const double> priorities) {
    for (int64_t id = 0; id < capacity_; ++id) tree_.leaf(id) = {0, kAbsent};
    int64_t present = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      HeapWord& leaf = tree_.leaf(at(ids[i]));
      present += leaf.key == kAbsent;
      leaf.key = key_of(priorities[i]);
    }
    tree_.rebuild();
    for (Counter& counter : counters_) counter.value.store(0, std::memory_order_relaxed);
    count(present);
  }

  // Removes each id in turn: while others push, the heap need not be empty at any moment.
  void clear() {
    for (int64_t id = 0; id < capacity_; ++id) remove(id);
  }

  const Tree& tree() const { return tree_; }

 private:
  enum class Write { kInsert, kUpdate, kUpsert };

  static constexpr uint64_t kFlags = Tree::kDirty | Tree::kClaim;
  static constexpr int64_t kMinSubtrees =
      16;  // subtrees for pop_relaxed: fewer contend, more are farther from the front
  // Elements of a batch whose cache lines are under way: those of the tree, of leaves alone.
  static constexpr size_t kPrefetchAhead = 8;
  static constexpr size_t kLookAhead = 32;

  static int64_t checked(int64_t capacity) {
    if (capacity < 1 || capacity > kMaxCapacity) {
      throw std::invalid_argument("IndexedHeap: capacity is " + std::to_string(capacity) + ", expected 1 to " +
                                  std::to_string(kMaxCapacity));
    }
    return capacity;
  }

  // At least 64 ids a stripe, so that the padding of the stripes stays below an eighth.
  static int default_log_stripes(int64_t capacity) {
    const int log = std::bit_width(static_cast<uint64_t>(capacity > 0 ? capacity : 0) >> 6) - 1;
    return log < 0 ? 0 : log > 6 ? 6 : log;
  }

  int64_t at(int64_t id) const {
    assert(0 <= id && id < capacity_);
    return id;
  }

  // The order-preserving image of a double, flipped for a max-heap. No number has the image kAbsent: only a NaN would.
  uint64_t key_of(double priority) const {
    assert(!std::isnan(priority));
    const uint64_t bits = std::bit_cast<uint64_t>(priority + 0.0);  // -0.0 + 0.0 is 0.0
    return bits ^ (bits >> 63 != 0 ? ~uint64_t{0} : uint64_t{1} << 63) ^ flip_;
  }

  double priority_of(uint64_t key) const {
    key ^= flip_;
    return std::bit_cast<double>(key ^ (key >> 63 != 0 ? uint64_t{1} << 63 : ~uint64_t{0}));
  }

  static bool is_dirty(HeapWord leaf) { return (leaf.tag & Tree::kDirty) != 0; }
  static bool is_claimed(HeapWord leaf) { return (leaf.tag & Tree::kClaim) != 0; }
  static uint64_t next_tag(HeapWord leaf) { return (leaf.tag + Tree::kLeafVersion) & ~kFlags; }

  // Brings up the key of a dirty leaf that is `seen`, be it this thread's or, when its element is asked for, another's.
  void settle(HeapWord& leaf, int64_t id, HeapWord seen) {
    tree_.settle(id);
    Atomics::compare_exchange_tag(leaf, seen, seen.tag & ~Tree::kDirty);
  }

  // Replaces the leaf that was `seen`; false when it has changed.
  bool replace(HeapWord& leaf, int64_t id, HeapWord seen, uint64_t key) {
    const uint64_t dirty = key < seen.key ? Tree::kDirty : seen.tag & Tree::kDirty;
    const HeapWord next = {next_tag(seen) | dirty, key};
    if (!Atomics::compare_exchange(leaf, seen, next)) return false;
    dirty != 0 ? settle(leaf, id, next) : tree_.chase(id, seen.key);
    return true;
  }

  // Empties the leaf that was `seen`; false when it has changed.
  bool take(HeapWord& leaf, int64_t id, HeapWord seen) {
    if (!Atomics::compare_exchange(leaf, seen, {next_tag(seen), kAbsent})) return false;
    tree_.chase(id, seen.key);
    return true;
  }

  // Returns whether the id was present before.
  template <Write kWrite>
  bool write(int64_t id, uint64_t key) {
    HeapWord& leaf = tree_.leaf(at(id));
    Memory memory;
    for (;;) {
      memory.forget_all_but();
      const HeapWord seen = Atomics::load(leaf);
      const bool present = seen.key != kAbsent;
      if (kWrite == Write::kInsert && present) {
        // Not enough to have seen it: a pop may already have decided to take it.
        if (contains(id)) return true;
        continue;
      }
      if (kWrite == Write::kUpdate && !present) return false;
      if (replace(leaf, id, seen, key)) return present;
    }
  }

  // Applies `change(leaf, id, seen)` to the first element, until it returns true.
  template <class Change>
  std::optional<HeapEntry> change_first(Change change) {
    Memory memory;
    for (;;) {
      memory.forget_all_but();
      const HeapWord root = Atomics::load(tree_.root());
      if (root.key == kAbsent) return std::nullopt;
      const int64_t id = tree_.id_of(root);
      HeapWord& leaf = tree_.leaf(id);
      HeapWord seen = Atomics::load(leaf);
      // A thread that has just taken or claimed this leaf is usually about to finish. To do its work a second time
      // costs both threads more than a short wait.
      if (seen.key != root.key) {
        if (!Atomics::changes_soon(tree_.root(), root)) tree_.help(id, root.key);
        continue;
      }
      if (is_claimed(seen)) {
        if (Atomics::changes_soon(leaf, seen)) continue;
      } else {
        tree_.prefetch_path(id);
        const uint64_t claimed = seen.tag | Tree::kClaim;
        if (!Atomics::compare_exchange_tag(leaf, seen, claimed)) continue;
        seen.tag = claimed;
      }
      if (!tree_.holds(Atomics::load(tree_.root()), root.key, id)) continue;
      if (change(leaf, id, seen)) return HeapEntry{id, priority_of(seen.key)};
    }
  }

  std::optional<HeapEntry> take_first() {
    return change_first([this](HeapWord& leaf, int64_t id, HeapWord seen) { return take(leaf, id, seen); });
  }

  std::optional<HeapEntry> take_relaxed(uint64_t& state) {
    Memory memory;
    for (int attempt = 0; attempt < 4 && sample_level_ > 0; ++attempt) {
      memory.forget_all_but(attempt);
      const uint64_t random = next_random(state);
      const HeapWord a = Atomics::load(random_subtree(static_cast<uint32_t>(random)));
      const HeapWord b = Atomics::load(random_subtree(random >> 32));
      const HeapWord first = b.key < a.key ? b : a;
      if (first.key == kAbsent) continue;
      const int64_t id = tree_.id_of(first);
      tree_.prefetch_path(id);
      HeapWord& leaf = tree_.leaf(id);
      const HeapWord seen = Atomics::load(leaf);
      if (seen.key != first.key) {
        tree_.help(id, first.key);
      } else if (take(leaf, id, seen)) {
        return HeapEntry{id, priority_of(seen.key)};
      }
    }
    return take_first();
  }

  HeapWord& random_subtree(uint64_t random32) const {
    return tree_.node(sample_level_, static_cast<int64_t>(random32 * static_cast<uint64_t>(relaxed_subtrees()) >> 32));
  }

  // splitmix64 (Steele, Lea, Flood 2014).
  static uint64_t next_random(uint64_t& state) {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  bool is_vacant(int64_t id) const { return Atomics::load_key(tree_.leaf(id)) == kAbsent; }

  template <class Test>
  size_t find(std::span<const int64_t> ids, Test test) const {
    size_t i = 0;
    for (; i < ids.size(); ++i) {
      if (i + kLookAhead < ids.size()) tree_.prefetch_leaf(at(ids[i + kLookAhead]));
      if (test(ids[i])) break;
    }
    return i;
  }

  template <Write kWrite, class Skipped>
  void write_many(std::span<const int64_t> ids, std::span<const double> priorities, Skipped&& skipped) {
    assert(ids.size() == priorities.size());
    Tally inserted{*this};
    for (const int64_t id : ids.first(std::min(kPrefetchAhead, ids.size()))) tree_.prefetch(at(id));
    for (size_t i = 0; i < ids.size(); ++i) {
      if (i + kPrefetchAhead < ids.size()) tree_.prefetch(at(ids[i + kPrefetchAhead]));
      const bool present = write<kWrite>(ids[i], key_of(priorities[i]));
      if (kWrite != Write::kUpdate && !present) inserted.add(1);
      if (kWrite == Write::kInsert ? present : kWrite == Write::kUpdate && !present) skipped(i);
    }
  }

  template <class Take>
  size_t pop_many(std::span<int64_t> ids, std::span<double> priorities, Take take) {
    assert(ids.size() == priorities.size());
    Tally taken{*this};
    size_t n = 0;
    for (; n < ids.size(); ++n) {
      const std::optional<HeapEntry> entry = take();
      if (!entry) break;
      ids[n] = entry->id;
      priorities[n] = entry->priority;
      taken.add(-1);
    }
    return n;
  }

  std::optional<HeapEntry> counted(std::optional<HeapEntry> taken) {
    if (taken) count(-1);
    return taken;
  }

  // size() is a sum over counters, each used by some of the threads, in cache lines of their own. Relaxed: nothing is
  // read off them but their sum.
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  static constexpr unsigned kCounters = 16;

  void count(int64_t change) {
    static std::atomic<unsigned> threads{0};
    static thread_local unsigned slot = 0;
    if (slot == 0) slot = 1 + threads.fetch_add(1, std::memory_order_relaxed) % kCounters;
    counters_[slot - 1].value.fetch_add(change, std::memory_order_relaxed);
  }

  // What a batch adds to the count, some elements at a time.
  struct Tally {
    static constexpr int64_t kMost = 64;
    BasicIndexedHeap& heap;
    int64_t change = 0;

    void add(int64_t one) {
      change += one;
      if (change == kMost || change == -kMost) heap.count(std::exchange(change, 0));
    }
    ~Tally() {
      if (change != 0) heap.count(change);
    }
  };

  Tree tree_;
  int64_t capacity_;
  uint64_t flip_;
  int sample_level_ = 0;
  Counter counters_[kCounters];
};

using IndexedHeap = BasicIndexedHeap<>;

}  // namespace foveal
