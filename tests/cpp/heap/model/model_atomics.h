// The atomics policy through which the model checker runs IndexedHeap, and the account of what a thread has learnt by
// it.
//
// A thread's future depends on its program and on what it has read since its call, less what the header says that it
// forgets. Versions of words are left out of that: they only ever decide whether a compare-and-swap succeeds and
// whether two reads of a word were equal, so for each word that was read or written it is enough to know whether it is
// still the same, and which earlier read it equals.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "fiber.h"
#include "foveal/heap_word.h"

namespace model {

using foveal::HeapWord;

// What one thread knows.
class Knowledge {
 public:
  void read(const HeapWord& place, HeapWord value, bool whole) {
    Item item{&place, value, whole, 0};
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].place == &place && items_[i].whole && items_[i].value == value)
        item.same_as = static_cast<int>(i) + 1;
    }
    items_.push_back(item);
  }
  void learn(uint64_t value) { items_.push_back({nullptr, {value, 0}, false, 0}); }
  void forget_from(size_t size) { items_.resize(size); }
  void clear() { items_.clear(); }
  size_t size() const { return items_.size(); }

  template <class Mix, class VersionMask>
  void hash(Mix mix, VersionMask version_mask) const {
    for (const Item& item : items_) {
      if (item.place == nullptr) {
        mix(item.value.tag);
        continue;
      }
      mix(reinterpret_cast<uintptr_t>(item.place));
      mix(item.value.key);
      if (!item.whole) continue;
      mix(item.value.tag & ~version_mask(*item.place));
      mix(static_cast<uint64_t>(item.same_as) << 1 | (*item.place == item.value));
    }
  }

 private:
  struct Item {
    const HeapWord* place;
    HeapWord value;
    bool whole;   // else only the key was read
    int same_as;  // 1 + index of an earlier item that read the same, or 0
  };
  std::vector<Item> items_;
};

// The atomics policy: hands each access to the search that is under way; outside of one it is an ordinary access.
struct ModelAtomics {
  static inline Knowledge* knowledge = nullptr;  // of the thread that runs; null outside of a search

  static uint64_t load_key(const HeapWord& word) {
    step();
    if (knowledge != nullptr) knowledge->read(word, {0, word.key}, false);
    return word.key;
  }

  static HeapWord load(const HeapWord& word) {
    step();
    if (knowledge != nullptr) knowledge->read(word, word, true);
    return word;
  }

  static bool compare_exchange(HeapWord& word, HeapWord expected, HeapWord desired) {
    step();
    const bool swapped = word == expected;
    if (swapped) word = desired;
    if (knowledge != nullptr) {
      swapped ? knowledge->read(word, word, true) : knowledge->learn(0);
    }
    return swapped;
  }

  static bool compare_exchange_tag(HeapWord& word, HeapWord expected, uint64_t tag) {
    step();
    const bool swapped = word.tag == expected.tag;
    if (swapped) word.tag = tag;
    if (knowledge != nullptr) {
      swapped ? knowledge->read(word, word, true) : knowledge->learn(0);
    }
    return swapped;
  }

  static bool changes_soon(const HeapWord& word, HeapWord seen) { return load(word) != seen; }

  class Memory {
   public:
    Memory() : base_(knowledge != nullptr ? knowledge->size() : 0) {}
    template <class... Live>
    void forget_all_but(const Live&... live) {
      if (knowledge == nullptr || !forgetting) return;
      knowledge->forget_from(base_);
      (keep(live), ...);
    }

   private:
    template <class Live>
    static void keep(const Live& live) {
      if constexpr (std::is_integral_v<Live>) {
        knowledge->learn(static_cast<uint64_t>(live));
      } else {
        for (int i = 0; i < live.count; ++i) knowledge->read(*live.node[i], live.word[i], true);
      }
    }
    size_t base_;
  };

  struct Endless {};
  static inline int64_t steps_left = 0;  // outside of a search: thrown at zero

  static inline bool forgetting = true;  // false: search without the header's hints, to check that they are right

 protected:
  static void step() {
    if (knowledge != nullptr) return Fiber::suspend();
    if (steps_left-- == 0) throw Endless();
  }
};

// The same, with a load made of three as NativeAtomics makes it.
struct SplitLoadAtomics : ModelAtomics {
  static HeapWord load(const HeapWord& word) {
    for (;;) {
      const uint64_t tag = load_tag(word);
      const uint64_t key = load_key(word);
      if (load_tag(word) == tag) return {tag, key};
    }
  }

 private:
  static uint64_t load_tag(const HeapWord& word) {
    step();
    if (knowledge != nullptr) knowledge->read(word, word, true);
    return word.tag;
  }
};

}  // namespace model
