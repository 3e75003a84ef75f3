// An exhaustive model checker for IndexedHeap: runs the real header under every schedule of a small Scenario.
//
// Each thread of the scenario is a fiber that stops before every access to shared memory, so a step is one access and
// the thread's own computation up to its next access. Depth-first search over all choices of the next thread, under
// sequential consistency, backtracking by copies of memory, fibers and linearizer.
//
// A state already seen is not searched again. It is known by a 64-bit fingerprint (in a search of n states a wrong
// match has probability n^2 / 2^65) of: the words without their versions; the candidates of the linearizer; and what
// each thread knows (see model_atomics.h).
//
// A state met again on the path that leads to it is a schedule in which threads take steps for ever: a livelock.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <optional>
#include <set>
#include <type_traits>
#include <unordered_set>
#include <vector>

#include "fiber.h"
#include "fingerprint.h"
#include "foveal/indexed_heap.h"
#include "linearizer.h"
#include "model_atomics.h"
#include "scenario.h"

namespace model {

enum class Verdict { kCorrect, kNotLinearizable, kLivelock, kWrongEnd, kTooLarge };
constexpr const char* kVerdictName[] = {"correct", "not linearizable", "livelock", "wrong contents at the end",
                                        "too large"};

struct Outcome {
  Verdict verdict = Verdict::kCorrect;
  int64_t states = 0;
  int64_t ends = 0;
  std::vector<uint8_t> schedule;  // of the counterexample: the thread of each step
  std::set<uint64_t> answers;     // with keep_answers: of all complete histories, the answers of each thread
};

struct Options {
  int log_stripes = 0;
  int64_t max_states = 8'000'000;
  bool keep_answers = false;
};

template <class Heap>
class Explorer {
 public:
  Explorer(const Scenario& scenario, const Options& options)
      : scenario_(scenario),
        heap_(scenario.capacity, foveal::Order::kMin, options.log_stripes, 2),
        max_states_(options.max_states),
        keep_answers_(options.keep_answers) {
    std::vector<int64_t> ids;
    std::vector<double> priorities;
    for (int id = 0; id < scenario_.capacity; ++id) {
      if (scenario.initial[id] == kNone) continue;
      ids.push_back(id);
      priorities.push_back(scenario.initial[id]);
    }
    ModelAtomics::steps_left = 1000;
    heap_.assign(ids, priorities);
    const auto& tree = heap_.tree();
    for (int level = 0; level <= tree.root_level(); ++level) {
      for (int64_t i = 0; i < tree.size(level); ++i) {
        words_.push_back(&tree.node(level, i));
        version_masks_.push_back(tree.version_mask(level));
      }
    }
    version_mask_at_.resize(static_cast<size_t>(tree.nbytes()) / sizeof(HeapWord));
    for (size_t i = 0; i < words_.size(); ++i) version_mask_at_[words_[i] - tree.words()] = version_masks_[i];
    start();
  }

  Outcome search() {
    const std::vector<HeapWord> at_start = copy_words();
    descend();
    put_words(at_start);
    return outcome_;
  }

  // Runs one schedule and prints each step.
  void print(const std::vector<uint8_t>& schedule) {
    for (const uint8_t thread : schedule) {
      const Operation op = scenario_.threads[thread][threads_[thread].op];
      const bool explained = step(thread);
      std::printf("  T%d %-16s", thread, to_string(op).c_str());
      const auto& tree = heap_.tree();
      for (int level = tree.root_level(); level >= 0; --level) {
        std::printf(" |");
        for (int64_t i = 0; i < tree.size(level); ++i) print_word(level, tree.node(level, i));
      }
      if (threads_[thread].answered) {
        std::printf("  -> (%d,%d)%s", threads_[thread].result.id, threads_[thread].result.priority,
                    explained ? "" : "  explained by no order");
      }
      std::printf("\n");
    }
  }

 private:
  struct Thread {
    size_t op = 0;  // of its program: under way, or next
    bool called = false;
    bool answered = false;  // in the last step
    Result result;
    uint64_t answers = 0;  // fingerprint of all its results
    Knowledge knowledge;
  };
  struct Start {
    Explorer* explorer;
    int thread;
  };
  struct Frame {  // what a step of one thread may change
    Fiber::Copy fiber;
    Thread thread;
    Linearizer linearizer;
    std::vector<HeapWord> words;
  };

  void start() {
    linearizer_ = Linearizer(scenario_.initial);
    for (int i = 0; i < thread_count(); ++i) {
      starts_[i] = {this, i};
      ModelAtomics::knowledge = &threads_[i].knowledge;
      fibers_[i].start(&Explorer::run_program, &starts_[i]);
    }
    ModelAtomics::knowledge = nullptr;
  }

  int thread_count() const { return static_cast<int>(scenario_.threads.size()); }
  bool finished(int thread) const { return threads_[thread].op == scenario_.threads[thread].size(); }

  static void run_program(void* argument) {
    const Start start = *static_cast<Start*>(argument);
    Explorer& self = *start.explorer;
    for (const Operation& op : self.scenario_.threads[start.thread]) {
      const Result result = model::run(self.heap_, op);
      Thread& thread = self.threads_[start.thread];
      thread.result = result;
      thread.answered = true;
      thread.called = false;
      ++thread.op;
      thread.knowledge.clear();
    }
    for (;;) Fiber::suspend();
  }

  // Returns false when the operation that returned in this step has an answer that no order explains.
  bool step(int i) {
    Thread& thread = threads_[i];
    if (!thread.called) {
      thread.called = true;
      linearizer_.call(i);
    }
    thread.answered = false;
    Linearizer::Current current;
    for (int t = 0; t < thread_count(); ++t) {
      if (!finished(t)) current[t] = scenario_.threads[t][threads_[t].op];
    }
    ModelAtomics::knowledge = &thread.knowledge;
    fibers_[i].resume();
    ModelAtomics::knowledge = nullptr;
    if (!thread.answered) return true;
    thread.answers = mix64(thread.answers, static_cast<uint64_t>(thread.result.id) << 8 | thread.result.priority);
    return linearizer_.return_from(i, thread.result, current);
  }

  // Returns false when the search is over.
  bool descend() {
    if (path_.size() == frames_.size()) frames_.emplace_back();
    bool any = false;
    for (int i = 0; i < thread_count(); ++i) {
      if (finished(i)) continue;
      any = true;
      {
        Frame& frame = frames_[path_.size()];
        fibers_[i].save(frame.fiber);
        frame.thread = threads_[i];
        frame.linearizer = linearizer_;
        frame.words = copy_words();
      }
      path_.push_back(static_cast<uint8_t>(i));
      if (!step(i)) return stop(Verdict::kNotLinearizable);
      const uint64_t state = fingerprint();
      if (seen_.insert(state)) {
        on_path_.insert(state);
        if (++outcome_.states > max_states_) return stop(Verdict::kTooLarge);
        if (!descend()) return false;
        on_path_.erase(state);
      } else if (on_path_.count(state) != 0) {
        return stop(Verdict::kLivelock);
      }
      path_.pop_back();
      const Frame& frame = frames_[path_.size()];
      fibers_[i].restore(frame.fiber);
      threads_[i] = frame.thread;
      linearizer_ = frame.linearizer;
      put_words(frame.words);
    }
    return any || check_end();
  }

  bool stop(Verdict verdict) {
    outcome_.verdict = verdict;
    outcome_.schedule = path_;
    return false;
  }

  // All programs have ended: the heap must hold what the history leaves, and pop it in order.
  bool check_end() {
    ++outcome_.ends;
    uint64_t answers = 0;
    for (const Thread& thread : threads_) answers = mix64(answers, thread.answers);
    if (keep_answers_) outcome_.answers.insert(answers);
    ModelAtomics::steps_left = 10'000;
    try {
      return drains_right() || stop(Verdict::kWrongEnd);
    } catch (const ModelAtomics::Endless&) {
      return stop(Verdict::kLivelock);
    }
  }

  bool drains_right() {
    const std::vector<HeapWord> before = copy_words();
    TinyContents contents = nothing<kMaxIds>();
    for (int id = 0; id < scenario_.capacity; ++id) {
      const auto priority = heap_.priority(id);
      contents[id] = priority ? static_cast<uint8_t>(*priority) : kNone;
    }
    put_words(before);
    bool right = linearizer_.allows(contents);
    TinyContents left = contents;
    for (int n = 0; right && n <= scenario_.capacity; ++n) {
      Result expected;
      apply_sequentially(left, {Kind::kPop}, [&](const TinyContents& after, Result result) {
        left = after;
        expected = result;
      });
      if (model::run(heap_, {Kind::kPop}) != expected) right = false;
      if (expected.id == kNone) break;
    }
    put_words(before);
    return right;
  }

  uint64_t fingerprint() const {
    uint64_t hash = 1;
    const auto mix = [&hash](uint64_t value) { hash = mix64(hash, value); };
    for (size_t i = 0; i < words_.size(); ++i) {
      mix(words_[i]->key);
      mix(words_[i]->tag & ~version_masks_[i]);
    }
    for (int i = 0; i < thread_count(); ++i) {
      mix(threads_[i].op << 1 | threads_[i].called);
      if (keep_answers_) mix(threads_[i].answers);
      mix(threads_[i].knowledge.size());
      threads_[i].knowledge.hash(mix, [this](const HeapWord& place) {
        return version_mask_at_[static_cast<size_t>(&place - heap_.tree().words())];
      });
    }
    mix(linearizer_.fingerprint());
    return hash;
  }

  std::vector<HeapWord> copy_words() const {
    std::vector<HeapWord> copy;
    copy.reserve(words_.size());
    for (const HeapWord* word : words_) copy.push_back(*word);
    return copy;
  }
  void put_words(const std::vector<HeapWord>& copy) {
    for (size_t i = 0; i < words_.size(); ++i) *words_[i] = copy[i];
  }

  void print_word(int level, HeapWord word) const {
    if (word.key == ~uint64_t{0}) {
      std::printf(" -");
    } else {
      const double priority = std::bit_cast<double>(word.key ^ (uint64_t{1} << 63));
      std::printf(" %g", priority);
      if (level > 0) std::printf("@%d", static_cast<int>(heap_.tree().id_of(word)));
    }
    if (word.tag & 1) std::printf("d");
    if (level == 0 && (word.tag & 2)) std::printf("c");
  }

  Scenario scenario_;
  Heap heap_;
  int64_t max_states_;
  bool keep_answers_;
  std::vector<HeapWord*> words_;
  std::vector<uint64_t> version_masks_;
  std::vector<uint64_t> version_mask_at_;

  std::array<Fiber, kMaxThreads> fibers_;
  std::array<Start, kMaxThreads> starts_;
  std::array<Thread, kMaxThreads> threads_;
  Linearizer linearizer_;

  std::vector<uint8_t> path_;
  std::deque<Frame> frames_;
  FingerprintSet seen_;
  std::unordered_set<uint64_t> on_path_;  // a subset of seen_
  Outcome outcome_;
};

}  // namespace model
