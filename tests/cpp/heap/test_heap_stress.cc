// Real threads on IndexedHeap, more of them than cores, delayed at random before their accesses: every history is
// recorded and checked for linearizability. Then one thread suspended for ever before each of its accesses in turn: the
// others go on.
//
//   test_heap_stress [SECONDS]      of random histories; 3 by default
//
// Built three times: as it is, under ThreadSanitizer, and under AddressSanitizer with UndefinedBehaviorSanitizer.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "model/history.h"

namespace {

using namespace model;
using foveal::HeapWord;
using foveal::NativeAtomics;

constexpr size_t kIds = 12;
constexpr size_t kThreads = 8;
constexpr Kind kAllKinds[] = {Kind::kPush, Kind::kUpdate,   Kind::kUpsert,     Kind::kRemove, Kind::kPop,
                              Kind::kPeek, Kind::kPriority, Kind::kPopRelaxed, Kind::kPopPush};

// NativeAtomics with a call of Hook::before_access() before each access.
template <class Hook>
struct HookedAtomics : NativeAtomics {
  static uint64_t load_key(const HeapWord& word) {
    Hook::before_access();
    return NativeAtomics::load_key(word);
  }
  static HeapWord load(const HeapWord& word) {
    Hook::before_access();
    return NativeAtomics::load(word);
  }
  static bool compare_exchange(HeapWord& word, HeapWord expected, HeapWord desired) {
    Hook::before_access();
    return NativeAtomics::compare_exchange(word, expected, desired);
  }
  static bool compare_exchange_tag(HeapWord& word, HeapWord expected, uint64_t tag) {
    Hook::before_access();
    return NativeAtomics::compare_exchange_tag(word, expected, tag);
  }
};

// Now and then gives the processor away, or stays for some hundred nanoseconds.
struct Dawdle {
  static inline thread_local uint64_t state = 1;
  static void before_access() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    if (state % 32 == 0) std::this_thread::yield();
    if (state % 64 == 1) {
      for (int i = 0; i < 200; ++i) asm volatile("" ::: "memory");
    }
  }
};

// Stops the thread before the access that `steps_left` counts down to, until released.
struct Park {
  static inline thread_local int64_t steps_left = -1;
  static inline std::atomic<bool> parked, released;
  static void before_access() {
    if (steps_left < 0 || steps_left-- > 0) return;
    parked = true;
    while (!released) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
};

Operation random_operation(std::mt19937& random) {
  Operation op{kAllKinds[random() % std::size(kAllKinds)]};
  if (takes_id(op.kind)) op.id = static_cast<uint8_t>(random() % kIds);
  if (takes_priority(op.kind)) op.priority = static_cast<uint8_t>(1 + random() % 6);
  return op;
}

template <class Heap>
Contents<kIds> contents_of(Heap& heap) {
  Contents<kIds> contents;
  for (size_t id = 0; id < kIds; ++id) {
    const auto priority = heap.priority(static_cast<int64_t>(id));
    contents[id] = priority ? static_cast<uint8_t>(*priority) : kNone;
  }
  return contents;
}

template <class Heap>
void fill(Heap& heap, const Contents<kIds>& contents) {
  std::vector<int64_t> ids;
  std::vector<double> priorities;
  for (size_t id = 0; id < kIds; ++id) {
    if (contents[id] == kNone) continue;
    ids.push_back(static_cast<int64_t>(id));
    priorities.push_back(contents[id]);
  }
  heap.assign(ids, priorities);
}

bool is_linearizable(const Contents<kIds>& before, const std::vector<Recorded>& history, const Contents<kIds>& after) {
  return HistoryJudge<kIds>(history, after).has_order(before);
}

// Rounds of a few operations a thread, each from known contents, until the time is up.
template <int kLogFanout>
void test_histories(double seconds, int log_stripes) {
  constexpr size_t kOperations = 4;
  foveal::BasicIndexedHeap<HookedAtomics<Dawdle>, kLogFanout> heap(kIds, foveal::Order::kMin, log_stripes, 2);
  std::array<std::array<Recorded, kOperations>, kThreads> recorded;
  std::atomic<int64_t> clock{0};
  std::atomic<bool> stop{false};
  std::barrier barrier(kThreads + 1);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(100 * kLogFanout + t));
      Dawdle::state = t + 1;
      for (;;) {
        barrier.arrive_and_wait();
        if (stop) return;
        for (size_t i = 0; i < kOperations; ++i) {
          Recorded& record = recorded[t][i];
          record.op = random_operation(random);
          record.called = clock++;
          record.result = run(heap, record.op);
          record.returned = clock++;
        }
        barrier.arrive_and_wait();
      }
    });
  }
  std::mt19937 random(5);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t rounds = 0, overlapping = 0;
  for (; std::chrono::steady_clock::now() < end; ++rounds) {
    Contents<kIds> before;
    for (uint8_t& priority : before) priority = random() % 2 != 0 ? static_cast<uint8_t>(1 + random() % 6) : kNone;
    fill(heap, before);
    barrier.arrive_and_wait();
    barrier.arrive_and_wait();
    std::vector<Recorded> history;
    for (const auto& of_thread : recorded) {
      history.insert(history.end(), of_thread.begin(), of_thread.end());
      for (const Recorded& record : of_thread) overlapping += record.returned - record.called > 1;
    }
    FOVEAL_CHECK(is_linearizable(before, history, contents_of(heap)));
    int64_t present = 0;
    for (const uint8_t priority : contents_of(heap)) present += priority != kNone;
    FOVEAL_CHECK(heap.size() == present);
  }
  stop = true;
  barrier.arrive_and_wait();
  for (std::thread& thread : threads) thread.join();
  std::printf("fan-out %d: %lld rounds, %.0f%% of the operations overlapped others\n", 1 << kLogFanout,
              static_cast<long long>(rounds),
              100.0 * static_cast<double>(overlapping) / static_cast<double>(rounds * kThreads * kOperations));
  FOVEAL_CHECK(rounds > 0 && overlapping > 0);
}

// What another thread does while one is parked: every operation, and the heap emptied and filled again.
std::vector<Operation> visit() {
  std::vector<Operation> operations = {{Kind::kPeek},          {Kind::kPriority, 3},  {Kind::kPush, 3, 2},
                                       {Kind::kUpdate, 3, 5},  {Kind::kUpsert, 4, 1}, {Kind::kRemove, 5},
                                       {Kind::kPopPush, 0, 3}, {Kind::kPopRelaxed}};
  for (size_t i = 0; i <= kIds; ++i) operations.push_back({Kind::kPop});
  for (size_t id = 0; id < kIds; ++id)
    operations.push_back({Kind::kPush, static_cast<uint8_t>(id), static_cast<uint8_t>(1 + id % 4)});
  operations.push_back({Kind::kPeek});
  return operations;
}

template <int kLogFanout>
void test_parked_thread_stops_nobody() {
  const Contents<kIds> before = {2, 4, kNone, kNone, 3, 6, 2, kNone, 1, 5, kNone, 6};
  int64_t parkings = 0;
  for (const Operation op : {Operation{Kind::kPush, 3, 1},
                             {Kind::kPush, 7, 6},
                             {Kind::kUpdate, 8, 6},
                             {Kind::kUpdate, 5, 1},
                             {Kind::kUpsert, 2, 1},
                             {Kind::kRemove, 8},
                             {Kind::kPop},
                             {Kind::kPeek},
                             {Kind::kPriority, 8},
                             {Kind::kPopRelaxed},
                             {Kind::kPopPush, 0, 6}}) {
    for (int64_t step = 0;; ++step) {
      foveal::BasicIndexedHeap<HookedAtomics<Park>, kLogFanout> heap(kIds, foveal::Order::kMin, 0, 2);
      fill(heap, before);
      Park::parked = Park::released = false;
      std::vector<Recorded> history = {{op, {}, -1, 1'000'000}};
      std::atomic<bool> done{false};
      std::thread thread([&] {
        Park::steps_left = step;
        history[0].result = run(heap, op);
        done = true;
      });
      while (!Park::parked && !done) std::this_thread::yield();
      const bool was_parked = Park::parked;
      if (was_parked) {
        std::vector<Recorded> meanwhile;
        for (const Operation& other : visit()) {
          const int64_t time = static_cast<int64_t>(meanwhile.size());
          meanwhile.push_back({other, run(heap, other), 2 * time, 2 * time + 1});
        }
        FOVEAL_CHECK(!done);
        ++parkings;
        Park::released = true;
        thread.join();
        history.insert(history.end(), meanwhile.begin(), meanwhile.end());
      } else {
        thread.join();
      }
      FOVEAL_CHECK(is_linearizable(before, history, contents_of(heap)));
      if (!was_parked) break;
    }
  }
  std::printf("fan-out %d: parked at %lld steps\n", 1 << kLogFanout, static_cast<long long>(parkings));
}

// What a thread wrote before it pushed an id, in plain memory, is there for the thread that pops the id. (That it is
// no data race is for ThreadSanitizer to say.)
void test_pop_sees_what_push_published() {
  constexpr int64_t kSlots = 64;
  constexpr int kRoundsPerThread = 5000;
  foveal::BasicIndexedHeap<HookedAtomics<Dawdle>> heap(kSlots);
  std::array<int64_t, kSlots> written{};
  for (int64_t id = 0; id < kSlots; ++id) heap.push(id, static_cast<double>(id));
  std::vector<std::thread> threads;
  std::atomic<int64_t> wrong{0};
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Dawdle::state = t + 1;
      std::mt19937 random(static_cast<unsigned>(t));
      uint64_t state = t;
      for (int i = 0; i < kRoundsPerThread; ++i) {
        const auto entry = i % 2 != 0 ? heap.pop() : heap.pop_relaxed(state);
        if (!entry) continue;
        int64_t& slot = written[static_cast<size_t>(entry->id)];
        wrong += static_cast<int64_t>(entry->priority) % kSlots != (entry->id + slot) % kSlots;
        ++slot;
        const auto priority = static_cast<double>((entry->id + slot) % kSlots + kSlots * (random() % 100));
        wrong += !heap.push(entry->id, priority);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  FOVEAL_CHECK(wrong == 0 && heap.size() == kSlots);
}

// The judge itself: an answer out of order is refused, the same answer from an overlapping call is not.
void test_judge() {
  Contents<kIds> empty;
  empty.fill(kNone);
  const auto judge = [&](int64_t pop_called) {
    return is_linearizable(empty, {{{Kind::kPush, 0, 2}, {}, 0, 1}, {{Kind::kPop}, {kNone, kNone}, pop_called, 10}},
                           [&] {
                             Contents<kIds> after = empty;
                             after[0] = 2;
                             return after;
                           }());
  };
  FOVEAL_CHECK(!judge(2));
  FOVEAL_CHECK(judge(0));
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 3;
  test_judge();
  test_pop_sees_what_push_published();
  test_parked_thread_stops_nobody<1>();
  test_parked_thread_stops_nobody<3>();
  test_histories<1>(seconds / 2, 1);
  test_histories<3>(seconds / 2, 0);
  return foveal_test::result();
}
