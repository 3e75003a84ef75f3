// The priority queues that heap_bench measures IndexedHeap against, all with the same five members:
// build, update, push, pop, and a constructor from the capacity. Keys are doubles, smallest first.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(FOVEAL_BENCH_TBB)
#define FOVEAL_BENCH_TBB __has_include(<tbb/concurrent_priority_queue.h>)
#endif
#if FOVEAL_BENCH_TBB
#include <tbb/concurrent_priority_queue.h>
#endif

#include "foveal/indexed_heap.h"

namespace bench {

// The heap under test, with an exact or a relaxed pop.
template <bool kRelaxed>
class Lockfree {
 public:
  explicit Lockfree(int64_t capacity) : heap_(capacity) {}

  void build(std::span<const int64_t> ids, std::span<const double> priorities) { heap_.assign(ids, priorities); }
  void update(int64_t id, double priority) { heap_.update(id, priority); }
  void push(int64_t id, double priority) { heap_.upsert(id, priority); }
  bool pop(int64_t& id, double& priority) {
    thread_local uint64_t state = reinterpret_cast<uintptr_t>(&state);
    const auto entry = kRelaxed ? heap_.pop_relaxed(state) : heap_.pop();
    if (!entry) return false;
    id = entry->id;
    priority = entry->priority;
    return true;
  }

  foveal::IndexedHeap& heap() { return heap_; }

 private:
  foveal::IndexedHeap heap_;
};

// The heap under test, its updates handed over 256 at a time (each thread's in a batch of its own).
class Batched : public Lockfree<false> {
 public:
  using Lockfree::Lockfree;

  void update(int64_t id, double priority) {
    thread_local std::array<int64_t, 256> ids;
    thread_local std::array<double, 256> priorities;
    thread_local size_t count = 0;
    ids[count] = id;
    priorities[count] = priority;
    if (++count < ids.size()) return;
    count = 0;
    heap().update_many(ids, priorities, [](size_t) {});
  }
};

// The textbook array-indexed d-ary heap: a heap array of (priority, id) and each id's place in it. For one thread.
class Sequential {
 public:
  explicit Sequential(int64_t capacity) : heap_(capacity), place_(capacity, kAbsent) {}

  void build(std::span<const int64_t> ids, std::span<const double> priorities) {
    count_ = static_cast<uint32_t>(ids.size());
    for (uint32_t i = 0; i < count_; ++i) put(i, {priorities[i], static_cast<uint32_t>(ids[i])});
    for (uint32_t i = count_ / kArity + 1; i-- > 0;) {
      if (i < count_) sift_down(i, heap_[i]);
    }
  }

  void update(int64_t id, double priority) {
    const uint32_t i = place_[id];
    if (i == kAbsent) return;
    const Entry entry = {priority, static_cast<uint32_t>(id)};
    priority < heap_[i].priority ? sift_up(i, entry) : sift_down(i, entry);
  }

  void push(int64_t id, double priority) {
    if (place_[id] != kAbsent) return update(id, priority);
    sift_up(count_++, {priority, static_cast<uint32_t>(id)});
  }

  bool pop(int64_t& id, double& priority) {
    if (count_ == 0) return false;
    id = heap_[0].id;
    priority = heap_[0].priority;
    place_[id] = kAbsent;
    if (--count_ > 0) sift_down(0, heap_[count_]);
    return true;
  }

 private:
  struct Entry {
    double priority;
    uint32_t id;
  };
  static constexpr uint32_t kArity = 4;
  static constexpr uint32_t kAbsent = ~uint32_t{0};

  void put(uint32_t i, Entry entry) {
    heap_[i] = entry;
    place_[entry.id] = i;
  }

  void sift_up(uint32_t i, Entry entry) {
    while (i > 0) {
      const uint32_t parent = (i - 1) / kArity;
      if (heap_[parent].priority <= entry.priority) break;
      put(i, heap_[parent]);
      i = parent;
    }
    put(i, entry);
  }

  void sift_down(uint32_t i, Entry entry) {
    for (;;) {
      const uint32_t first = i * kArity + 1;
      if (first >= count_) break;
      const uint32_t last = std::min(first + kArity, count_);
      uint32_t best = first;
      for (uint32_t child = first + 1; child < last; ++child) {
        if (heap_[child].priority < heap_[best].priority) best = child;
      }
      if (heap_[best].priority >= entry.priority) break;
      put(i, heap_[best]);
      i = best;
    }
    put(i, entry);
  }

  std::vector<Entry> heap_;
  std::vector<uint32_t> place_;
  uint32_t count_ = 0;
};

class Spinlock {
 public:
  void lock() {
    while (held_.exchange(true, std::memory_order_acquire)) {
      while (held_.load(std::memory_order_relaxed)) pause();
    }
  }
  void unlock() { held_.store(false, std::memory_order_release); }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  std::atomic<bool> held_{false};
};

template <class Lock>
class Locked {
 public:
  explicit Locked(int64_t capacity) : heap_(capacity) {}

  void build(std::span<const int64_t> ids, std::span<const double> priorities) { heap_.build(ids, priorities); }
  void update(int64_t id, double priority) {
    const std::lock_guard guard(lock_);
    heap_.update(id, priority);
  }
  void push(int64_t id, double priority) {
    const std::lock_guard guard(lock_);
    heap_.push(id, priority);
  }
  bool pop(int64_t& id, double& priority) {
    const std::lock_guard guard(lock_);
    return heap_.pop(id, priority);
  }

 private:
  alignas(64) Lock lock_;
  alignas(64) Sequential heap_;
};

#if FOVEAL_BENCH_TBB
// oneTBB has no change of priority: an update pushes a new version, pop skips outdated ones.
class Tbb {
 public:
  explicit Tbb(int64_t capacity) : version_(capacity) {}

  void build(std::span<const int64_t> ids, std::span<const double> priorities) {
    std::vector<Entry> entries;
    for (size_t i = 0; i < ids.size(); ++i) {
      version_[ids[i]] = 1;
      entries.push_back({priorities[i], static_cast<uint32_t>(ids[i]), 1});
    }
    queue_.assign(entries.begin(), entries.end());
  }
  void update(int64_t id, double priority) { push(id, priority); }
  void push(int64_t id, double priority) {
    const uint32_t version = version_[id].fetch_add(1, std::memory_order_relaxed) + 1;
    queue_.push({priority, static_cast<uint32_t>(id), version});
  }
  bool pop(int64_t& id, double& priority) {
    Entry entry;
    while (queue_.try_pop(entry)) {
      if (version_[entry.id].load(std::memory_order_relaxed) != entry.version) continue;
      id = entry.id;
      priority = entry.priority;
      return true;
    }
    return false;
  }

 private:
  struct Entry {
    double priority;
    uint32_t id, version;
    bool operator<(const Entry& other) const { return priority > other.priority; }
  };
  tbb::concurrent_priority_queue<Entry> queue_;
  std::vector<std::atomic<uint32_t>> version_;
};
#endif

}  // namespace bench
