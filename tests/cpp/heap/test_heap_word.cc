// The atomic accesses to a heap's word, as the machine does them: alone, and by two threads on one word.
//
// Built twice: as it is, and under ThreadSanitizer, where the accesses are the compiler's.
#include <sys/time.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <csignal>
#include <thread>

#include "check.h"
#include "foveal/heap_word.h"

namespace {

using foveal::HeapWord;
using foveal::NativeAtomics;

// How often a thread has to find a word that the other has just changed. A machine that is busy with something else
// may run the two by turns; then the time is up first, and the test has seen less.
constexpr uint64_t kMeetings = 100'000;

class Deadline {
 public:
  bool is_over() const { return std::chrono::steady_clock::now() > end_; }

 private:
  std::chrono::steady_clock::time_point end_ = std::chrono::steady_clock::now() + std::chrono::seconds(5);
};

void test_swaps_compare_the_whole_word() {
  HeapWord word = {1, 2};
  FOVEAL_CHECK(!NativeAtomics::compare_exchange(word, {1, 3}, {5, 6}));
  FOVEAL_CHECK(!NativeAtomics::compare_exchange(word, {3, 2}, {5, 6}));
  FOVEAL_CHECK(!NativeAtomics::compare_exchange_tag(word, {3, 2}, 5));
  FOVEAL_CHECK(word == (HeapWord{1, 2}));
  FOVEAL_CHECK(NativeAtomics::compare_exchange(word, {1, 2}, {~uint64_t{0}, 6}));
  FOVEAL_CHECK(NativeAtomics::load(word) == (HeapWord{~uint64_t{0}, 6}));
  FOVEAL_CHECK(NativeAtomics::compare_exchange_tag(word, {~uint64_t{0}, 6}, 7));
  FOVEAL_CHECK(NativeAtomics::load(word) == (HeapWord{7, 6}) && NativeAtomics::load_key(word) == 6);
}

void test_changes_soon_is_true_to_the_word() {
  const HeapWord word = {1, 2};
  FOVEAL_CHECK(!NativeAtomics::changes_soon(word, word));
  FOVEAL_CHECK(NativeAtomics::changes_soon(word, {3, 2}));
  FOVEAL_CHECK(NativeAtomics::changes_soon(word, {1, 3}));
}

#if defined(__x86_64__) && defined(__OPTIMIZE__) && !defined(FOVEAL_WORD_BUILTIN)

#define FOVEAL_SECTION(name) extern "C" const unsigned char __start_##name[], __stop_##name[]
}  // namespace
FOVEAL_SECTION(foveal_swap_code);
FOVEAL_SECTION(foveal_swap_tag_code);
namespace {

__attribute__((noinline, flatten, used, section("foveal_swap_code"))) bool swap(HeapWord& word, HeapWord expected,
                                                                                HeapWord desired) {
  return NativeAtomics::compare_exchange(word, expected, desired);
}
__attribute__((noinline, flatten, used, section("foveal_swap_tag_code"))) bool swap_tag(HeapWord& word,
                                                                                        HeapWord expected) {
  return NativeAtomics::compare_exchange_tag(word, expected, 5);
}

// How often the two-byte instruction 0F `opcode` stands there with a REX prefix, and how often a lock prefix is before
// that.
struct Swaps {
  int all = 0, locked = 0;
  Swaps(const unsigned char* begin, const unsigned char* end, unsigned char opcode) {
    for (const unsigned char* at = begin + 2; at + 1 < end; ++at) {
      if (at[0] != 0x0F || at[1] != opcode || (at[-1] & 0xF8) != 0x48) continue;
      ++all;
      locked += at[-2] == 0xF0;
    }
  }
};

// Threads see what one instruction did in several steps only where they run at the same time. A busy machine may run
// them by turns, and the tests below then see nothing; so the instructions themselves are read.
void test_swaps_are_locked_instructions() {
  constexpr unsigned char kCmpxchg16b = 0xC7, kCmpxchg = 0xB1;
  HeapWord word = {1, 2};
  FOVEAL_CHECK(swap(word, {1, 2}, {3, 4}) && swap_tag(word, {3, 4}) && word == (HeapWord{5, 4}));
  const Swaps both(__start_foveal_swap_code, __stop_foveal_swap_code, kCmpxchg16b);
  FOVEAL_CHECK(both.all >= 1);
  FOVEAL_CHECK_EQ(both.locked, both.all);
  const Swaps tag(__start_foveal_swap_tag_code, __stop_foveal_swap_tag_code, kCmpxchg);
  FOVEAL_CHECK(tag.all >= 1);
  FOVEAL_CHECK_EQ(tag.locked, tag.all);
}

#else
void test_swaps_are_locked_instructions() {}  // the compiler's own atomics, or another machine's
#endif

template <class First, class Second>
void together(First first, Second second) {
  std::barrier barrier(2);
  std::thread thread([&] {
    barrier.arrive_and_wait();
    second();
  });
  barrier.arrive_and_wait();
  first();
  thread.join();
}

// Key and tag change together: no load may see them of different words, nor the key go back.
void test_loads_see_one_word() {
  HeapWord word = {0, 0};
  std::atomic<bool> stop{false};
  uint64_t torn = 0, backwards = 0, meetings = 0, refused = 0;
  const auto write = [&] {
    for (uint64_t n = 0; !stop; ++n) {
      refused += !NativeAtomics::compare_exchange(word, {n, 3 * n}, {n + 1, 3 * n + 3});
    }
  };
  const auto read = [&] {
    const Deadline deadline;
    uint64_t key = 0;
    while (meetings < kMeetings && !deadline.is_over()) {
      for (int i = 0; i < 1000; ++i) {
        const HeapWord seen = NativeAtomics::load(word);
        torn += seen.key != 3 * seen.tag;
        backwards += seen.key < key;
        meetings += seen.key != key;
        key = NativeAtomics::load_key(word);
        torn += key % 3 != 0;
        backwards += key < seen.key;
      }
    }
    stop = true;
  };
  together(read, write);
  FOVEAL_CHECK_EQ(refused, 0U);  // nobody else writes
  FOVEAL_CHECK_EQ(torn, 0U);
  FOVEAL_CHECK_EQ(backwards, 0U);
  FOVEAL_CHECK(meetings > 0);
}

#if !defined(FOVEAL_WORD_BUILTIN)
// The same without a second thread, for machines that run threads by turns: a signal changes the word between any two
// instructions of the load.
HeapWord changed_by_signal = {0, 0};
volatile std::sig_atomic_t signals = 0;

void change_word(int) {
  const uint64_t n = changed_by_signal.tag;
  NativeAtomics::compare_exchange(changed_by_signal, {n, 3 * n}, {n + 1, 3 * n + 3});
  signals = signals + 1;
}

void test_loads_see_one_word_between_signals() {
  const auto before = std::signal(SIGALRM, change_word);
  const itimerval every = {{0, 20}, {0, 20}}, never = {};
  setitimer(ITIMER_REAL, &every, nullptr);
  uint64_t torn = 0;
  const Deadline deadline;
  while (signals < 2000 && !deadline.is_over()) {
    for (int i = 0; i < 1000; ++i) {
      const HeapWord seen = NativeAtomics::load(changed_by_signal);
      torn += seen.key != 3 * seen.tag;
    }
  }
  setitimer(ITIMER_REAL, &never, nullptr);
  std::signal(SIGALRM, before);
  FOVEAL_CHECK(signals > 0);
  FOVEAL_CHECK_EQ(torn, 0U);
}
#else
void test_loads_see_one_word_between_signals() {}  // one instruction of the processor, or a lock
#endif

// Each thread adds to the word, until they have met often enough; every success counts once.
template <class Change, class Other>
void add_together(Change change, Other other) {
  HeapWord word = {0, 0};
  std::atomic<uint64_t> successes{0}, meetings{0};
  const auto repeat = [&](auto change) {
    return [&, change] {
      const Deadline deadline;
      while (meetings < kMeetings && !deadline.is_over()) {
        HeapWord last = NativeAtomics::load(word);
        uint64_t added = 0, met = 0;
        for (int i = 0; i < 10'000; ++i) {
          const HeapWord seen = NativeAtomics::load(word);
          met += seen != last;
          const bool swapped = change(word, seen);
          added += swapped;
          last = swapped ? NativeAtomics::load(word) : seen;
        }
        successes += added;
        meetings += met;
      }
    };
  };
  together(repeat(change), repeat(other));
  FOVEAL_CHECK(meetings > 0);
  FOVEAL_CHECK_EQ(word.tag & 0xFFFFFFFF, successes.load());
  FOVEAL_CHECK_EQ(word.key, 3 * (word.tag >> 32));
}

// The upper half of the tag counts the changes of the key.
bool add_to_both(HeapWord& word, HeapWord seen) {
  return NativeAtomics::compare_exchange(word, seen, {seen.tag + (uint64_t{1} << 32) + 1, seen.key + 3});
}
bool add_to_tag(HeapWord& word, HeapWord seen) { return NativeAtomics::compare_exchange_tag(word, seen, seen.tag + 1); }

void test_no_swap_is_lost() {
  add_together(add_to_both, add_to_both);
  add_together(add_to_both, add_to_tag);
  add_together(add_to_tag, add_to_tag);
}

}  // namespace

int main() {
  test_swaps_compare_the_whole_word();
  test_changes_soon_is_true_to_the_word();
  test_swaps_are_locked_instructions();
  test_loads_see_one_word_between_signals();
  test_loads_see_one_word();
  test_no_swap_is_lost();
  return foveal_test::result();
}
