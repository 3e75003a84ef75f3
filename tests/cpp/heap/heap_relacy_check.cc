// IndexedHeap under the C++ memory model: the real header on Relacy's simulated atomics (D. Vyukov, relacy.hpp), where
// a load may return any value that the order of the access permits, not only the newest. Random executions of the
// scenarios below; of each, the history must be linearizable, the heap drain in order, and plain memory that is handed
// over by push and pop be free of data races.
//
//   heap_relacy_check [--executions N] [--order seq_cst | acq_rel]
//
// With seq_cst, the order that the header uses, nothing may be found. acq_rel is an experiment: what would go wrong.
// Here a word is one atomic object of 16 bytes; that the header loads it in halves is outside of any C++ memory model.
// Relacy does not let a load return a value that is stored later in the execution (load buffering).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "model/history.h"
#include "model/scenario.h"

namespace foveal {
// Relacy prints the values that it stores.
inline std::ostream& operator<<(std::ostream& out, const HeapWord& word) { return out << word.key << '/' << word.tag; }
}  // namespace foveal

#include <relacy/relacy.hpp>

namespace {

using namespace model;
using foveal::HeapWord;

constexpr size_t kWords = 64;

rl::memory_order load_order = rl::mo_seq_cst, swap_order = rl::mo_seq_cst;

// The atomics policy. Relacy keeps its own copy of each word, in `shadow`; until there is one, while the heap is being
// made, the words themselves are used.
struct RelacyAtomics : foveal::NativeAtomics {
  static inline const HeapWord* words = nullptr;
  static inline rl::atomic<HeapWord>* shadow = nullptr;

  static rl::atomic<HeapWord>& of(const HeapWord& word) { return shadow[&word - words]; }

  static HeapWord load(const HeapWord& word) { return shadow == nullptr ? word : of(word)($).load(load_order); }
  static uint64_t load_key(const HeapWord& word) { return load(word).key; }
  static bool compare_exchange(HeapWord& word, HeapWord expected, HeapWord desired) {
    return of(word)($).compare_exchange_strong(expected, desired, swap_order, load_order);
  }
  static bool compare_exchange_tag(HeapWord& word, HeapWord expected, uint64_t tag) {
    return compare_exchange(word, expected, {tag, expected.key});
  }
  static bool changes_soon(const HeapWord& word, HeapWord seen) { return load(word) != seen; }
};

Scenario scenario;  // of the executions that follow

template <int kThreads>
struct Execution : rl::test_suite<Execution<kThreads>, kThreads> {
  using Heap = foveal::BasicIndexedHeap<RelacyAtomics, 1>;

  Heap heap{scenario.capacity, foveal::Order::kMin, 0, 2};
  rl::atomic<HeapWord> shadow[kWords];
  rl::var<int> payload[kMaxIds];  // written by whoever inserts the id, read by whoever takes it out
  std::vector<Recorded> history[kThreads];
  int64_t clock = 0;

  void before() {
    std::vector<int64_t> ids;
    std::vector<double> priorities;
    for (int id = 0; id < scenario.capacity; ++id) {
      payload[id]($) = 0;
      if (scenario.initial[id] == kNone) continue;
      ids.push_back(id);
      priorities.push_back(scenario.initial[id]);
    }
    RelacyAtomics::shadow = nullptr;
    heap.assign(ids, priorities);
    RelacyAtomics::words = heap.tree().words();
    const size_t count = static_cast<size_t>(heap.nbytes()) / sizeof(foveal::HeapWord);
    RL_ASSERT(count <= kWords);
    for (size_t i = 0; i < count; ++i) shadow[i]($).store(RelacyAtomics::words[i], rl::mo_relaxed);
    RelacyAtomics::shadow = shadow;
  }

  void thread(unsigned index) {
    for (const Operation& op : scenario.threads[index]) {
      Recorded record{op, {}, clock++, 0};
      if (op.kind == Kind::kPush) payload[op.id]($) = static_cast<int>(index);
      record.result = run(heap, op);
      record.returned = clock++;
      if (op.kind == Kind::kPop && record.result.id != kNone) payload[record.result.id]($).load();
      if (op.kind == Kind::kRemove && record.result.priority != kNone) payload[op.id]($).load();
      history[index].push_back(record);
    }
  }

  void after() {
    TinyContents left = nothing<kMaxIds>();
    for (int id = 0; id < scenario.capacity; ++id) {
      const auto priority = heap.priority(id);
      left[id] = priority ? static_cast<uint8_t>(*priority) : kNone;
    }
    std::vector<Recorded> all;
    for (const auto& of_thread : history) all.insert(all.end(), of_thread.begin(), of_thread.end());
    RL_ASSERT(HistoryJudge<kMaxIds>(all, left).has_order(scenario.initial));
    for (int n = 0; n <= scenario.capacity; ++n) {
      Result expected;
      apply_sequentially(left, {Kind::kPop}, [&](const TinyContents& contents, Result result) {
        left = contents;
        expected = result;
      });
      RL_ASSERT(run(heap, {Kind::kPop}) == expected);
    }
  }
};

template <int kThreads>
bool passes(uint64_t executions) {
  rl::test_params params;
  params.iteration_count = executions;
  params.search_type = rl::random_scheduler_type;
  params.execution_depth_limit = 20'000;
  std::ostream nowhere(nullptr);
  params.output_stream = params.progress_stream = &nowhere;
  const bool passed = rl::simulate<Execution<kThreads>>(params);
  std::printf("%-60s %s", to_string(scenario).c_str(), passed ? "passed\n" : rl::test_result_str(params.test_result));
  if (!passed) std::printf(" in execution %llu\n", static_cast<unsigned long long>(params.stop_iteration));
  std::fflush(stdout);
  return passed;
}

// Each id is pushed while absent, by one thread, and at most once more by the one that popped it: so its payload is
// handed over, never shared. The first ones are those in which the simpler heaps of test_heap_model fail.
constexpr const char* kScenarios[] = {
    "- - - - | push(0,2) | push(1,4) pop",
    "- - - 2 | pop | push(0,3)",
    "- - - 2 | pop | push(0,3) | push(1,2)",
    "3 1 - - | push(3,4) | push(2,1)",
    "4 - - 1 | pop | push(2,1) | peek",
    "- - - 4 | push(1,3) priority(3) | pop",
    "1 3 2 - | pop | pop push(3,1) | peek peek",
    "3 1 1 2 | update(2,1) | upsert(1,2) | update(2,2)",
    "- - - - | push(0,1) push(1,2) | pop pop",
    "- - - - | push(0,3) | push(1,2) | pop pop",
    "- 2 - 4 | push(0,3) remove(0) | pop pop | peek",
    "2 4 - - | update(1,1) push(2,3) | pop_push(3) | pop_relaxed",
    "1 2 3 4 | pop pop | pop pop",
    "4 4 4 4 | update(0,1) | update(1,1) | pop",
    "- - - - | push(0,1) | push(1,1) | push(2,1)",
};

}  // namespace

int main(int argc, char** argv) {
  uint64_t executions = 20'000;
  std::string order = "seq_cst";
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--executions")
      executions = std::strtoull(argv[i + 1], nullptr, 10);
    else if (name == "--order")
      order = argv[i + 1];
    else
      return std::fprintf(stderr, "heap_relacy_check: unknown option %s\n", argv[i]), 2;
  }
  if (argc % 2 == 0 || (order != "seq_cst" && order != "acq_rel")) {
    std::fprintf(stderr, "heap_relacy_check: see the top of heap_relacy_check.cc\n");
    return 2;
  }
  if (order == "acq_rel") {
    load_order = rl::mo_acquire;
    swap_order = rl::mo_acq_rel;
  }
  int failed = 0;
  for (const char* text : kScenarios) {
    scenario = parse(text);
    failed += !(scenario.threads.size() == 2 ? passes<2>(executions) : passes<3>(executions));
  }
  std::printf("%s: %zu scenarios, %llu executions of each, %d failed\n", order.c_str(), std::size(kScenarios),
              static_cast<unsigned long long>(executions), failed);
  return failed > 0 ? 1 : 0;
}
