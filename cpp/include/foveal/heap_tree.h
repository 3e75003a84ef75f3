// The tournament tree under the indexed heap: a wide f-array (Jayanti 2002) of minima with early stopping.
//
// A leaf holds the key of one id, an inner node a copy of the smallest (key, id) among its children, the root the
// minimum. Whoever changes a leaf refreshes the nodes above it: read the node, read its children, compare-and-swap the
// smallest in. Three failed tries are as good as a success: a third thread must then have read the children after this
// one began.
//
// A refresh that changes nothing ends the climb, so most updates touch a level or two and the root is no point of
// contention. That alone would be wrong, since the value found equal may be on its way up in another thread, which is
// then waited for by nobody. Hence two marks. `dirty` on a node says that one of its ancestors may still exceed it; a
// climber that meets it goes on. And a climber that stops at an equal value has replaced the node by the same value
// with a new version (the bump), so that no refresh that began before can put back something older.
//
// A climb makes at most kTries compare-and-swaps a level up and one a level down, whatever other threads do.
//
// tests/cpp/heap/mutants.py leaves out or changes one rule after another and shows which check objects to that.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "foveal/heap_word.h"

#define FOVEAL_HEAP_INLINE inline __attribute__((always_inline))

namespace foveal {

template <class Atomics, int kLogFanout>
class HeapTree {
 public:
  static constexpr int kFanout = 1 << kLogFanout;
  static constexpr int64_t kMaxCapacity = int64_t{1} << 28;  // leaves 34 bits of version: see docs/concurrency.md
  static constexpr uint64_t kAbsent = ~uint64_t{0};          // the key of an absent id, and of an empty subtree
  static constexpr uint64_t kDirty = 1;
  static constexpr uint64_t kClaim = 2;        // leaves only
  static constexpr uint64_t kLeafVersion = 4;  // one step of a leaf's version
  static constexpr uint64_t kNodeVersion = 2;  // one step of a node's version

  //   level root_level()                 [ min of all ]
  //                                     /      ...     \                 kFanout children each, 128 bytes at fan-out 8
  //   level 1             [ min of 8 ] [ min of 8 ]  ...
  //   level 0, leaves     k k k k k k k k | k k k k k k k k | ...
  //
  // Ids are dealt out over `stripes` equal runs of leaves like cards, so that neighbouring ids, whose priorities tend
  // to be alike, stand in different subtrees:   leaf(id) = (id mod stripes) * stripe_length + id / stripes
  HeapTree(int64_t capacity, int log_stripes) : log_stripes_(log_stripes) {
    const int64_t stripes = int64_t{1} << log_stripes;
    stripe_length_ = round_up((capacity + stripes - 1) >> log_stripes);
    id_shift_ = 64;
    for (int64_t ids = capacity; ids > 0; ids >>= 1) --id_shift_;  // all ones stays free: the id of an empty subtree

    int64_t offset[kMaxLevels + 1];
    int64_t words = 0;
    for (int64_t size = stripes * stripe_length_;; size = (size + kFanout - 1) >> kLogFanout) {
      offset[root_level_] = words;
      size_[root_level_] = size;
      words += round_up_to(round_up(size), kAlignment / static_cast<int64_t>(sizeof(HeapWord)));
      if (size == 1) break;
      ++root_level_;
    }
    nbytes_ = words * static_cast<int64_t>(sizeof(HeapWord));
    words_.reset(new (std::align_val_t{kAlignment}) HeapWord[static_cast<size_t>(words)]);
    for (int level = 0; level <= root_level_; ++level) {
      level_[level] = words_.get() + offset[level];
      const uint64_t tag = level == 0 ? 0 : none();
      for (int64_t i = 0; i < round_up(size_[level]); ++i) level_[level][i] = {tag, kAbsent};
    }
  }

  HeapWord& leaf(int64_t id) const { return level_[0][leaf_index(id)]; }
  HeapWord& root() const { return level_[root_level_][0]; }
  int64_t id_of(HeapWord node) const { return static_cast<int64_t>(node.tag >> id_shift_); }
  bool holds(HeapWord node, uint64_t key, int64_t id) const { return node.key == key && id_of(node) == id; }

  int root_level() const { return root_level_; }
  int64_t size(int level) const { return size_[level]; }
  HeapWord& node(int level, int64_t index) const { return level_[level][index]; }
  int64_t nbytes() const { return nbytes_; }

  // For tests: all words, and the version bits of a word at `level`.
  HeapWord* words() const { return words_.get(); }
  uint64_t version_mask(int level) const { return level == 0 ? ~(kDirty | kClaim) : ~none() & ~kDirty; }

  // After the leaf was lowered or filled: on return no ancestor exceeds it, nor will until the leaf changes.
  void settle(int64_t id) { climb<Climb::kFull>(id, 0); }

  // After a settled leaf was raised or emptied: replaces the copies of its old key, as far as there are any.
  void chase(int64_t id, uint64_t old_key) { climb<Climb::kChase>(id, old_key); }

  // Somebody else's copy (old_key, id) was met at the root though the leaf has changed: replaces it up to the root.
  void help(int64_t id, uint64_t old_key) { climb<Climb::kHelp>(id, old_key); }

  // Fills all inner nodes from the leaves. The caller is alone.
  void rebuild() {
    const int64_t groups = stripe_length_ >> kLogFanout;
    for (int64_t i = 0; i < size_[1]; ++i) {
      const int64_t first_id = ((i % groups) << (kLogFanout + log_stripes_)) + i / groups;
      level_[1][i] = smallest_leaf(i, first_id);
    }
    for (int level = 2; level <= root_level_; ++level) {
      for (int64_t i = 0; i < size_[level]; ++i) level_[level][i] = smallest_node(level - 1, i);
    }
  }

  // Brings the cache lines that an update of `id` will need; all the way up for a pop; the leaf's to read it.
  FOVEAL_HEAP_INLINE void prefetch(int64_t id) const { prefetch_levels(id, root_level_ < 2 ? root_level_ : 2); }
  FOVEAL_HEAP_INLINE void prefetch_path(int64_t id) const { prefetch_levels(id, root_level_); }
  FOVEAL_HEAP_INLINE void prefetch_leaf(int64_t id) const { __builtin_prefetch(&leaf(id)); }

 private:
  static constexpr int64_t kAlignment = 128;
  static constexpr int kMaxLevels = 28 / kLogFanout + 2;
  static constexpr int kTries = 3;  // of two, both may fail to threads that read the children too early

  // kFull refreshes until a value stays as it is on a clean node. kChase and kHelp replace one stale copy, (old_key,
  // id): kChase ends at the first node without it, kHelp looks at every level, since copies may be left above a node
  // that is already right. One that leaves a node dirty goes on as kFull, for then it has a value of its own to bring
  // up.
  enum class Climb { kFull, kChase, kHelp };

  // The nodes that a climb has set dirty, lowest first.
  struct Marked {
    HeapWord* node[kMaxLevels];
    HeapWord word[kMaxLevels];
    int count = 0;
  };

  static constexpr int64_t round_up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
  static constexpr int64_t round_up(int64_t n) { return round_up_to(n, kFanout); }

  uint64_t none() const { return ~uint64_t{0} << id_shift_; }
  uint64_t id_tag(int64_t id) const { return static_cast<uint64_t>(id) << id_shift_; }

  int64_t leaf_index(int64_t id) const {
    return (id & ((int64_t{1} << log_stripes_) - 1)) * stripe_length_ + (id >> log_stripes_);
  }

  static bool is_dirty(HeapWord word) { return (word.tag & kDirty) != 0; }

  // Compares (key, id); the version below the id counts for nothing, for two children never hold the same id.
  static bool less(HeapWord a, HeapWord b) { return NativeAtomics::join(a) < NativeAtomics::join(b); }
  bool same(HeapWord a, HeapWord b) const { return a.key == b.key && (a.tag ^ b.tag) >> id_shift_ == 0; }

  HeapWord smallest_leaf(int64_t group, int64_t first_id) const {
    const HeapWord* leaves = level_[0] + (group << kLogFanout);
    uint64_t key = Atomics::load_key(leaves[0]);
    int64_t winner = 0;
    for (int64_t i = 1; i < kFanout; ++i) {
      const uint64_t other = Atomics::load_key(leaves[i]);
      const bool wins = other < key;
      key = wins ? other : key;
      winner = wins ? i : winner;
    }
    return {key == kAbsent ? none() : id_tag(first_id + (winner << log_stripes_)), key};
  }

  HeapWord smallest_node(int level, int64_t group) const {
    const HeapWord* nodes = level_[level] + (group << kLogFanout);
    HeapWord smallest = Atomics::load(nodes[0]);
    for (int i = 1; i < kFanout; ++i) {
      const HeapWord other = Atomics::load(nodes[i]);
      smallest = less(other, smallest) ? other : smallest;
    }
    return {smallest.tag & none(), smallest.key};
  }

  // The smallest child of the ancestor of `id` at `level`.
  HeapWord smallest_child(int level, int64_t index, int64_t id) const {
    if (level > 1) return smallest_node(level - 1, index);
    const int64_t place = id >> log_stripes_ & (kFanout - 1);
    return smallest_leaf(index, id - (place << log_stripes_));
  }

  // Level 1 apart and inline: most climbs end there, with nothing marked.
  template <Climb kStart>
  FOVEAL_HEAP_INLINE void climb(int64_t id, uint64_t old_key) {
    Climb mode = kStart;
    Marked marked;
    typename Atomics::Memory memory;
    const int64_t index = leaf_index(id) >> kLogFanout;
    if (refresh(1, index, id, old_key, mode, marked, memory)) {
      climb_on(index, id, old_key, mode, marked, memory);
    }
  }

  __attribute__((noinline)) void climb_on(int64_t index, int64_t id, uint64_t old_key, Climb mode, Marked& marked,
                                          typename Atomics::Memory& memory) {
    for (int level = 2; level <= root_level_; ++level) {
      index >>= kLogFanout;
      if (!refresh(level, index, id, old_key, mode, marked, memory)) break;
    }
    // In any order: the climb is over. A node that changed meanwhile is left to whoever changed it.
    while (marked.count > 0) {
      memory.forget_all_but(marked);
      --marked.count;
      const HeapWord word = marked.word[marked.count];
      Atomics::compare_exchange_tag(*marked.node[marked.count], word, word.tag & ~kDirty);
    }
  }

  // Returns whether to go on to the next level.
  FOVEAL_HEAP_INLINE bool refresh(int level, int64_t index, int64_t id, uint64_t old_key, Climb& mode, Marked& marked,
                                  typename Atomics::Memory& memory) {
    HeapWord& node = level_[level][index];
    const bool is_root = level == root_level_;
    for (int attempt = 0; attempt < kTries; ++attempt) {
      memory.forget_all_but(marked, level, attempt, static_cast<int>(mode));
      const bool for_copy = mode != Climb::kFull;
      const HeapWord seen = Atomics::load(node);
      if (for_copy && !holds(seen, old_key, id)) return mode == Climb::kHelp;
      const HeapWord smallest = smallest_child(level, index, id);
      const bool equal = same(smallest, seen);
      if (for_copy && equal) return mode == Climb::kHelp;
      const bool lowers = less(smallest, {seen.tag & none(), seen.key});
      const uint64_t dirty = is_root ? 0 : lowers ? kDirty : seen.tag & kDirty;
      const uint64_t version = (seen.tag + kNodeVersion) & version_mask(level);
      const HeapWord next = {smallest.tag | version | dirty, smallest.key};
      const bool swapped = equal ? Atomics::compare_exchange_tag(node, seen, next.tag)  // the bump
                                 : Atomics::compare_exchange(node, seen, next);
      if (!swapped) continue;
      if (dirty != 0) {
        marked.node[marked.count] = &node;
        marked.word[marked.count++] = next;
        mode = Climb::kFull;
      }
      return !equal || dirty != 0;
    }
    return true;  // another thread's refresh has included what this one knew, and is perhaps not further up yet
  }

  // Inline by force: GCC takes a function that does nothing but prefetch for one without effect and drops its calls.
  FOVEAL_HEAP_INLINE void prefetch_levels(int64_t id, int levels) const {
    constexpr int64_t kLine = 64 / sizeof(HeapWord);
    int64_t index = leaf_index(id);
    for (int level = 0; level < levels; ++level) {
      NativeAtomics::prefetch_to_write(level_[level][index]);
      for (int64_t other = kLine; other < kFanout; other += kLine) __builtin_prefetch(&level_[level][index ^ other]);
      index >>= kLogFanout;
    }
  }

  struct AlignedDelete {
    void operator()(HeapWord* words) const { ::operator delete[](words, std::align_val_t{kAlignment}); }
  };

  std::unique_ptr<HeapWord[], AlignedDelete> words_;
  HeapWord* level_[kMaxLevels + 1] = {};
  int64_t size_[kMaxLevels + 1] = {};
  int64_t stripe_length_ = 0;
  int64_t nbytes_ = 0;
  int root_level_ = 0;
  int log_stripes_ = 0;
  int id_shift_ = 0;
};

}  // namespace foveal
