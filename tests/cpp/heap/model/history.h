// Judges a recorded history of real threads: is there an order of the operations, each between its call and its return,
// that a sequential heap would have answered in the same way, and that leaves it with the contents that were found?
//
// Depth-first search for one such order, with the dead ends remembered (Wing and Gong 1993, Lowe 2017).
#pragma once

#include <algorithm>
#include <limits>
#include <unordered_set>
#include <vector>

#include "fingerprint.h"
#include "operation.h"

namespace model {

struct Recorded {
  Operation op;
  Result result;
  int64_t called;
  int64_t returned;
};

template <size_t kIds>
class HistoryJudge {
 public:
  // At most 64 operations, a pop_push counting as two.
  HistoryJudge(const std::vector<Recorded>& history, const Contents<kIds>& after) : after_(after) {
    for (const Recorded& recorded : history) {
      events_.push_back({recorded, -1, false});
      if (recorded.op.kind != Kind::kPopPush || recorded.result.id == kNone) continue;
      events_.back().recorded.op = {Kind::kPop};
      const Operation push = {Kind::kUpsert, recorded.result.id, recorded.op.priority};
      events_.push_back({{push, {}, recorded.called, recorded.returned}, static_cast<int>(events_.size()) - 1, true});
    }
    if (events_.size() > 64) throw std::invalid_argument("HistoryJudge: more than 64 operations");
  }

  bool has_order(const Contents<kIds>& contents, uint64_t placed = 0) {
    if (placed == all()) return contents == after_;
    uint64_t state = placed;
    for (const uint8_t priority : contents) state = mix64(state, priority);
    if (!dead_ends_.insert(state).second) return false;
    int64_t first_return = std::numeric_limits<int64_t>::max();
    for (size_t i = 0; i < events_.size(); ++i) {
      if ((placed >> i & 1) == 0) first_return = std::min(first_return, events_[i].recorded.returned);
    }
    for (size_t i = 0; i < events_.size(); ++i) {
      const Event& event = events_[i];
      if ((placed >> i & 1) != 0 || event.recorded.called > first_return) continue;
      if (event.follows >= 0 && (placed >> event.follows & 1) == 0) continue;
      bool found = false;
      apply_sequentially(contents, event.recorded.op, [&](const Contents<kIds>& next, Result result) {
        if (event.any_result || result == event.recorded.result)
          found = found || has_order(next, placed | uint64_t{1} << i);
      });
      if (found) return true;
    }
    return false;
  }

 private:
  struct Event {
    Recorded recorded;
    int follows;  // the event that must come first, or -1
    bool any_result;
  };

  uint64_t all() const { return ~uint64_t{0} >> (64 - events_.size()); }

  std::vector<Event> events_;
  Contents<kIds> after_;
  std::unordered_set<uint64_t> dead_ends_;
};

}  // namespace model
