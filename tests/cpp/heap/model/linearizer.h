// Judges a history of operations while it unfolds: is there an order of them, each between its call and its return,
// that a sequential heap would have answered in the same way?
//
// All such orders are followed at once: a Candidate is the contents that one of them leads to, and which of the
// operations under way it has already placed, with the answer they got. An empty set of candidates is a proof of the
// contrary.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "fingerprint.h"
#include "scenario.h"

namespace model {

enum class Stage : uint8_t { kIdle, kCalled, kHalf, kPlaced };  // kHalf: pop_push has popped and not yet pushed

class Linearizer {
 public:
  using Current = std::array<Operation, kMaxThreads>;  // of each thread, the operation that is under way

  Linearizer() = default;
  explicit Linearizer(const TinyContents& initial) : candidates_(1) { candidates_[0].contents = initial; }

  void call(size_t thread) {
    for (Candidate& candidate : candidates_) candidate.stage[thread] = Stage::kCalled;
    update_fingerprint();
  }

  // Returns false when no order explains `result`.
  bool return_from(size_t thread, Result result, const Current& current) {
    std::vector<Candidate> explained;
    // Each layer has one operation more in place than the one before, until that of `thread` is.
    for (std::vector<Candidate> layer = std::move(candidates_); !layer.empty();) {
      std::vector<Candidate> next;
      for (const Candidate& candidate : layer) {
        if (candidate.stage[thread] != Stage::kPlaced) {
          place_one(candidate, current, next);
        } else if (candidate.result[thread] == result) {
          explained.push_back(candidate);
          explained.back().stage[thread] = Stage::kIdle;
          explained.back().result[thread] = {};
        }
      }
      sort_unique(next);
      layer = std::move(next);
    }
    sort_unique(explained);
    candidates_ = std::move(explained);
    update_fingerprint();
    return !candidates_.empty();
  }

  // When no operation is under way.
  bool allows(const TinyContents& contents) const {
    return std::any_of(candidates_.begin(), candidates_.end(),
                       [&](const Candidate& c) { return c.contents == contents; });
  }

  uint64_t fingerprint() const { return fingerprint_; }

 private:
  struct Candidate {
    TinyContents contents{};
    std::array<Stage, kMaxThreads> stage{};
    std::array<Result, kMaxThreads> result{};

    auto operator<=>(const Candidate&) const = default;
  };

  static void sort_unique(std::vector<Candidate>& candidates) {
    std::sort(candidates.begin(), candidates.end());
    candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
  }

  // All ways to place one more of the pending operations.
  static void place_one(const Candidate& candidate, const Current& current, std::vector<Candidate>& out) {
    for (size_t i = 0; i < kMaxThreads; ++i) {
      Candidate next = candidate;
      if (candidate.stage[i] == Stage::kCalled) {
        apply_sequentially(candidate.contents, current[i], [&](const TinyContents& contents, Result answer) {
          next.contents = contents;
          next.result[i] = answer;
          const bool half = current[i].kind == Kind::kPopPush && answer.id != kNone;
          next.stage[i] = half ? Stage::kHalf : Stage::kPlaced;
          out.push_back(next);
        });
      } else if (candidate.stage[i] == Stage::kHalf) {
        next.contents[candidate.result[i].id] = current[i].priority;
        next.stage[i] = Stage::kPlaced;
        out.push_back(next);
      }
    }
  }

  void update_fingerprint() {
    fingerprint_ = candidates_.size();
    for (const Candidate& candidate : candidates_) {
      for (size_t at = 0; at < sizeof(Candidate); at += 8) {
        uint64_t part = 0;
        std::memcpy(&part, reinterpret_cast<const char*>(&candidate) + at, std::min<size_t>(8, sizeof(Candidate) - at));
        fingerprint_ = mix64(fingerprint_, part);
      }
    }
  }

  std::vector<Candidate> candidates_;  // sorted; call() keeps the order, as it does the same to all
  uint64_t fingerprint_ = 0;
};

}  // namespace model
