// A priority heap over dense ids for one thread: first in, first out among equal priorities.
//
// The 4-ary heap of the textbooks (Johnson 1975; d-ary for fewer levels and children that share a cache line), with
// each id's place in it, so that any priority can change: O(log4 n). An entry carries the number of the change that
// gave it its priority; equals leave by that number. A priority that is set to what it was keeps its number, and so its
// place among its equals.
//
// Sequential and twice as fast as the lock-free IndexedHeap for that (docs/benchmarks.md). Preconditions, asserted in
// debug builds: ids are below 2^32 - 1, present or absent as a function asks, priorities are not NaN.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace foveal {

// `kNumbers`: how many changes can be numbered before the entries are numbered anew; for tests.
template <uint32_t kNumbers = UINT32_MAX>
class BasicFifoHeap {
 public:
  using Id = uint32_t;

  explicit BasicFifoHeap(bool max = false) : sign_(max ? -1.0 : 1.0) {}

  bool max() const { return sign_ < 0; }
  size_t size() const { return entries_.size(); }
  bool empty() const { return entries_.empty(); }
  bool contains(Id id) const { return id < place_.size() && place_[id] != kAbsent; }

  Id top() const { return entries_.front().id; }
  double priority(Id id) const { return entries_[at(id)].priority * sign_ + 0.0; }

  // Whether a new entry of this priority would be the first.
  bool precedes_all(double priority) const { return empty() || ordered(priority) < entries_.front().priority; }

  // Strong guarantee: nothing has changed when it throws std::bad_alloc.
  void push(Id id, double priority) {
    assert(!contains(id));
    if (id >= place_.size()) place_.resize(size_t{id} + 1, kAbsent);
    const Entry entry = {ordered(priority), next_number(), id};
    entries_.emplace_back();
    sift_up(entries_.size() - 1, entry);
  }

  void update(Id id, double priority) {
    const size_t i = at(id);
    const double before = entries_[i].priority;
    const double after = ordered(priority);
    if (after == before) return;
    const Entry entry = {after, next_number(), id};
    after < before ? sift_up(i, entry) : sift_down(i, entry);
  }

  void remove(Id id) {
    const size_t i = at(id);
    place_[id] = kAbsent;
    const Entry last = entries_.back();
    entries_.pop_back();
    if (last.id == id) return;
    less(last, entries_[i > 0 ? (i - 1) / kArity : 0]) ? sift_up(i, last) : sift_down(i, last);
  }

  size_t nbytes() const { return entries_.capacity() * sizeof(Entry) + place_.capacity() * sizeof(uint32_t); }

  void clear() {
    entries_.clear();
    place_.clear();
  }

  // All ids in the order in which they came or last changed.
  std::vector<Id> by_age() const {
    std::vector<Entry> entries = entries_;
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.number < b.number; });
    std::vector<Id> ids;
    ids.reserve(entries.size());
    for (const Entry& entry : entries) ids.push_back(entry.id);
    return ids;
  }

 private:
  struct Entry {
    double priority;  // of a max-heap the negative
    uint32_t number;  // differs from entry to entry
    Id id;
  };
  static constexpr size_t kArity = 4;
  static constexpr uint32_t kAbsent = UINT32_MAX;

  double ordered(double priority) const {
    assert(!std::isnan(priority));
    return priority * sign_;
  }

  size_t at(Id id) const {
    assert(contains(id));
    return place_[id];
  }

  static bool less(const Entry& a, const Entry& b) {
    return (a.priority < b.priority) | ((a.priority == b.priority) & (a.number < b.number));
  }

  void put(size_t i, const Entry& entry) {
    entries_[i] = entry;
    place_[entry.id] = static_cast<uint32_t>(i);
  }

  // `entry` goes to the hole at `i` or above it.
  void sift_up(size_t i, const Entry& entry) {
    while (i > 0) {
      const size_t parent = (i - 1) / kArity;
      if (!less(entry, entries_[parent])) break;
      put(i, entries_[parent]);
      i = parent;
    }
    put(i, entry);
  }

  void sift_down(size_t i, const Entry& entry) {
    const size_t count = entries_.size();
    for (size_t first; (first = i * kArity + 1) < count;) {
      const size_t last = std::min(first + kArity, count);
      size_t best = first;
      for (size_t child = first + 1; child < last; ++child) best = less(entries_[child], entries_[best]) ? child : best;
      if (!less(entries_[best], entry)) break;
      put(i, entries_[best]);
      i = best;
    }
    put(i, entry);
  }

  uint32_t next_number() {
    if (numbered_ == kNumbers) {
      uint32_t number = 0;
      for (const Id id : by_age()) entries_[place_[id]].number = number++;
      numbered_ = number;
    }
    return numbered_++;
  }

  std::vector<Entry> entries_;
  std::vector<uint32_t> place_;  // of each id in entries_
  double sign_;
  uint32_t numbered_ = 0;
};

using FifoHeap = BasicFifoHeap<>;

}  // namespace foveal
