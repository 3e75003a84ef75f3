// The 16-byte word of the indexed heap, and the atomic accesses to it.
//
// A word pairs a 64-bit key with 64 bits of tag (id, version, flags). Every change of the key changes the version in
// the tag, so a tag never comes back while a thread may still hold it (the wrap-around is bounded in
// docs/concurrency.md). Two things follow and are used here:
//   - a 16-byte load can be made of 8-byte loads: tag, key, tag again; equal tags enclose one word;
//   - a change that leaves the key as it is can be an 8-byte compare-and-swap of the tag alone.
//
// Everything is sequentially consistent. The proof that a thread may give up after three failed refreshes needs one
// total order of all accesses; nothing weaker has been checked. All functions here are lock-free on x86-64 (cmpxchg16b)
// and on arm64 (caspal, or a pair of exclusives without the large-system extensions). Elsewhere all of them, the loads
// included, go to the compiler's 16-byte builtins, which may take a lock: a load made of 8-byte loads would not see it.
//
// An atomics policy is a class with the static functions of NativeAtomics; tests pass policies that let a model checker
// choose the order of accesses, or that park a thread before one of them.
#pragma once

#include <cstdint>

// ThreadSanitizer cannot see a compare-and-swap made of assembly.
#if defined(__SANITIZE_THREAD__) || !(defined(__x86_64__) || defined(__aarch64__))
#define FOVEAL_WORD_BUILTIN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FOVEAL_WORD_BUILTIN 1
#endif
#endif

namespace foveal {

//   byte 0        8        16
//        |  tag   |  key   |      inner node: tag = id (b bits) | version (63 - b) | dirty (1)
//                                 leaf:       tag = version (62) | claim (1) | dirty (1)
struct alignas(16) HeapWord {
  uint64_t tag;
  uint64_t key;

  bool operator==(const HeapWord&) const = default;
};

struct NativeAtomics {
  __extension__ typedef unsigned __int128 __attribute__((may_alias)) Uint128;

  static Uint128 join(HeapWord word) { return static_cast<Uint128>(word.key) << 64 | word.tag; }
  static HeapWord split(Uint128 bits) { return {static_cast<uint64_t>(bits), static_cast<uint64_t>(bits >> 64)}; }

  // Pairs with every compare_exchange of the same word.
  static uint64_t load_key(const HeapWord& word) {
#if defined(FOVEAL_WORD_BUILTIN)
    return load(word).key;
#else
    return __atomic_load_n(&word.key, __ATOMIC_SEQ_CST);
#endif
  }

  // Pairs with every compare_exchange of the same word. Lock-free, not wait-free: it repeats when the word changed
  // meanwhile.
  static HeapWord load(const HeapWord& word) {
#if defined(FOVEAL_WORD_BUILTIN)
    return split(__atomic_load_n(reinterpret_cast<const Uint128*>(&word), __ATOMIC_SEQ_CST));
#else
    for (;;) {
      const uint64_t tag = __atomic_load_n(&word.tag, __ATOMIC_SEQ_CST);
      const uint64_t key = __atomic_load_n(&word.key, __ATOMIC_SEQ_CST);
      if (__builtin_expect(__atomic_load_n(&word.tag, __ATOMIC_SEQ_CST) == tag, 1)) return {tag, key};
    }
#endif
  }

  // Pairs with the loads and the other compare-and-swaps of the same word.
  static bool compare_exchange(HeapWord& word, HeapWord expected, HeapWord desired) {
#if defined(__x86_64__) && !defined(FOVEAL_WORD_BUILTIN)
    bool swapped;
    asm volatile("lock cmpxchg16b %1"
                 : "=@ccz"(swapped), "+m"(word), "+a"(expected.tag), "+d"(expected.key)
                 : "b"(desired.tag), "c"(desired.key)
                 : "memory");
    return swapped;
#elif defined(__aarch64__) && defined(__ARM_FEATURE_ATOMICS) && !defined(FOVEAL_WORD_BUILTIN)
    register uint64_t tag asm("x0") = expected.tag;
    register uint64_t key asm("x1") = expected.key;
    register uint64_t new_tag asm("x2") = desired.tag;
    register uint64_t new_key asm("x3") = desired.key;
    asm volatile("caspal x0, x1, x2, x3, %[word]"
                 : "+r"(tag), "+r"(key), [word] "+Q"(word)
                 : "r"(new_tag), "r"(new_key)
                 : "memory");
    return tag == expected.tag && key == expected.key;
#elif defined(__aarch64__) && !defined(FOVEAL_WORD_BUILTIN)
    // A pair that was torn differs from `expected` too, and only tears when the word is changing.
    uint64_t tag, key;
    uint32_t failed;
    asm volatile(
        "1: ldaxp %[tag], %[key], %[word]\n"
        "   cmp   %[tag], %[old_tag]\n"
        "   ccmp  %[key], %[old_key], #0, eq\n"
        "   b.ne  2f\n"
        "   stlxp %w[failed], %[new_tag], %[new_key], %[word]\n"
        "   cbnz  %w[failed], 1b\n"
        "2:"
        : [tag] "=&r"(tag), [key] "=&r"(key), [failed] "=&r"(failed), [word] "+Q"(word)
        :
        [old_tag] "r"(expected.tag), [old_key] "r"(expected.key), [new_tag] "r"(desired.tag), [new_key] "r"(desired.key)
        : "cc", "memory");
    return tag == expected.tag && key == expected.key;
#else
    Uint128 seen = join(expected);
    return __atomic_compare_exchange_n(reinterpret_cast<Uint128*>(&word), &seen, join(desired), false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
#endif
  }

  // As compare_exchange of (expected.tag, k) by (tag, k) for the key k that goes with expected.tag.
  static bool compare_exchange_tag(HeapWord& word, HeapWord expected, uint64_t tag) {
#if defined(__x86_64__) && !defined(FOVEAL_WORD_BUILTIN)
    return __atomic_compare_exchange_n(&word.tag, &expected.tag, tag, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
#else
    return compare_exchange(word, expected, {tag, expected.key});
#endif
  }

  // Asks for the word's cache line in the state in which a compare-and-swap needs it: a plain prefetch would bring it
  // shared with the thread that wrote it last, to be asked for again. Not an access: part of no policy.
  static void prefetch_to_write(const HeapWord& word) {
#if defined(__x86_64__)
    asm volatile("prefetchw %0" ::"m"(word));  // compilers emit it only when told that the processor is a recent one
#else
    __builtin_prefetch(&word, 1);
#endif
  }

  // Waits a little for another thread to change the word, and says whether one did. Bounded, so that its callers keep
  // their progress. Pairs with every compare_exchange of the same word.
  static bool changes_soon(const HeapWord& word, HeapWord seen) {
    for (int i = 0; i < kWaits; ++i) {
      if (load(word) != seen) return true;
#if defined(__x86_64__)
      asm volatile("pause");
#elif defined(__aarch64__)
      asm volatile("isb");
#endif
    }
    return false;
  }
  static constexpr int kWaits = 16;  // some 200 ns: the time of one or two pops

  // A model checker's hook: from here on the caller depends on nothing that it has read since `Memory` was made, save
  // `live`.
  struct Memory {
    template <class... Live>
    void forget_all_but(const Live&...) {}
  };
};

}  // namespace foveal
