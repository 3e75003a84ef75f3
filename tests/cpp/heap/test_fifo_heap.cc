// FifoHeap against a plain model; with few numbers to give away, so that entries are numbered anew all the time.
#include "foveal/fifo_heap.h"

#include <limits>
#include <map>
#include <random>
#include <vector>

#include "check.h"

namespace {

using foveal::BasicFifoHeap;
using Id = uint32_t;

struct Model {
  struct Value {
    double priority;
    uint64_t number;
  };
  bool max;
  std::map<Id, Value> of;
  uint64_t numbered = 0;

  void set(Id id, double priority) {
    const auto found = of.find(id);
    if (found == of.end() || found->second.priority != priority) of[id] = {priority, numbered++};
  }
  Id top() const {
    auto best = of.begin();
    for (auto it = of.begin(); it != of.end(); ++it) {
      const Value &a = it->second, &b = best->second;
      const bool before = max ? a.priority > b.priority : a.priority < b.priority;
      if (before || (a.priority == b.priority && a.number < b.number)) best = it;
    }
    return best->first;
  }
};

template <uint32_t kNumbers>
void test_against_model(Id ids, bool max, int steps) {
  BasicFifoHeap<kNumbers> heap(max);
  Model model{max, {}};
  std::mt19937 random(ids);
  for (int i = 0; i < steps; ++i) {
    const Id id = random() % ids;
    const double priority = random() % 30 == 0 ? std::numeric_limits<double>::infinity() : random() % 5 - 2.0;
    FOVEAL_CHECK(heap.contains(id) == model.of.contains(id));
    if (random() % 4 == 0 && heap.contains(id)) {
      heap.remove(id);
      model.of.erase(id);
    } else if (heap.contains(id)) {
      FOVEAL_CHECK(heap.priority(id) == model.of[id].priority);
      heap.update(id, priority);
      model.set(id, priority);
    } else {
      heap.push(id, priority);
      model.set(id, priority);
    }
    FOVEAL_CHECK(heap.size() == model.of.size());
    if (!model.of.empty()) FOVEAL_CHECK(heap.top() == model.top());
    if (random() % 100 == 0) {
      uint64_t before = 0;
      for (const Id oldest : heap.by_age()) {
        FOVEAL_CHECK(model.of[oldest].number >= before);
        before = model.of[oldest].number;
      }
    }
  }
  while (!model.of.empty()) {
    const Id top = heap.top();
    FOVEAL_CHECK(top == model.top());
    heap.remove(top);
    model.of.erase(top);
  }
  FOVEAL_CHECK(heap.empty());
}

}  // namespace

int main() {
  for (const Id ids : {1, 2, 4, 5, 6, 17, 60}) {
    for (const bool max : {false, true}) {
      test_against_model<UINT32_MAX>(ids, max, 20'000);
      test_against_model<64>(ids, max, 20'000);
    }
  }
  return foveal_test::result();
}
