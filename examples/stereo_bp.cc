// Loopy min-sum belief propagation for stereo, in four orders of the messages. Built and driven by stereo_bp.py.
//
// Every pixel p takes one of `labels` disparities; minimised is the sum of data(p, l_p) over the pixels and, over
// neighbours, of weight * min(|l_p - l_q|, jump). The message from p to q,
//     m(l) = min over k of  h(k) + weight * min(|k - l|, jump),   h = data(p) + all messages to p but that from q,
// is kept with its minimum at zero (Felzenszwalb and Huttenlocher 2006).
//
// The residual of a message is the span, max - min, of the change that computing it anew would make. A change of span r
// of a message to p changes each message from p by a span of at most r. So adding up the spans of what came in bounds
// the residual of what should go out, without computing it: the priorities of Sutton and McCallum (Improved dynamic
// schedules for belief propagation, UAI 2007). The orders:
//   synchronous   all messages from those of the round before;
//   fifo          messages whose bound has come to exceed the tolerance, the longest waiting first;
//   residual      the same messages, the largest bound first, from foveal::IndexedHeap, by any number of threads;
//   relaxed       as residual, each thread taking the better of the first ones of two random subtrees (pop_relaxed).
// The last three end when no bound exceeds the tolerance: then no residual does. The first ends after a round in which
// no message changed by more; the residuals are then at most three times that.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "foveal/indexed_heap.h"

namespace {

constexpr int kLanes = 16;       // labels are padded to a multiple
constexpr int kMaxLabels = 256;  // with the padding
constexpr int kMaxJump = 8;
constexpr float kNever = 1e9f;  // more than any cost

// A message is known by the pixel that it goes to and the side that it comes from.
enum Side { kLeft, kRight, kAbove, kBelow };
constexpr int kSides = 4;
constexpr int opposite(int side) { return side ^ 1; }

struct Grid {
  int height, width, labels, jump;
  const float* data;    // height, width, labels
  const float* weight;  // height, width, 2: of the edge to the right, and to the pixel below

  int64_t pixels() const { return int64_t{height} * width; }
  int64_t messages() const { return pixels() * kSides; }
  int padded() const { return (labels + kLanes - 1) / kLanes * kLanes; }

  // The pixel on that side of p, or -1.
  int64_t neighbour(int64_t p, int side) const {
    const int64_t x = p % width;
    if (side == kLeft) return x > 0 ? p - 1 : -1;
    if (side == kRight) return x < width - 1 ? p + 1 : -1;
    if (side == kAbove) return p >= width ? p - width : -1;
    return p < pixels() - width ? p + width : -1;
  }

  float edge(int64_t p, int side) const {
    if (side == kRight || side == kBelow) return weight[p * 2 + (side == kBelow)];
    return weight[neighbour(p, side) * 2 + (side == kAbove)];
  }
};

// The messages, (pixel, side, padded label). With kShared, threads may read a message while one writes it: each label's
// value is then an atomic of its own, and a reader may get a mixture of old and new. That is no worse than to get the
// old: some label's value has gone up and another's down (each has its minimum at zero), so the mixture is as near to
// the new one, in span, as the old one was, and the writer, when it has finished, adds that much to the bounds of what
// depends on it.
class Messages {
 public:
  explicit Messages(const Grid& grid) : grid_(grid), padded_(grid.padded()), values_(grid.messages() * padded_) {}

  // Puts the message `id` into `out`, computed anew.
  template <bool kShared>
  void compute(int64_t id, float* out) const {
    const int64_t to = id / kSides;
    const int side = static_cast<int>(id % kSides);
    const int64_t from = grid_.neighbour(to, side);
    float room[kMaxLabels + 2 * kMaxJump];
    float* const h = room + kMaxJump;
    sum<kShared>(from, opposite(side), h);
    float lowest = kNever;
    for (int l = 0; l < grid_.labels; ++l) lowest = std::min(lowest, h[l]);
    std::fill(room, h, kNever);
    std::fill(h + grid_.labels, h + padded_ + kMaxJump, kNever);
    const float weight = grid_.edge(to, side);
    const float far = weight * static_cast<float>(grid_.jump);
    for (int l = 0; l < padded_; ++l) out[l] = std::min(h[l] - lowest, far);
    for (int d = 1; d < grid_.jump; ++d) {
      const float cost = weight * static_cast<float>(d) - lowest;
      for (int l = 0; l < padded_; ++l) out[l] = std::min(out[l], std::min(h[l - d], h[l + d]) + cost);
    }
  }

  template <bool kShared>
  float residual(int64_t id, const float* computed) const {
    const float* const values = values_.data() + id * padded_;
    float most = -kNever, least = kNever;
    for (int l = 0; l < grid_.labels; ++l) {
      const float change = computed[l] - get<kShared>(values[l]);
      most = std::max(most, change);
      least = std::min(least, change);
    }
    return most - least;
  }

  template <bool kShared>
  void put(int64_t id, const float* computed) {
    float* const values = values_.data() + id * padded_;
    for (int l = 0; l < padded_; ++l) {
      if constexpr (kShared) {
        std::atomic_ref<float>(values[l]).store(computed[l], std::memory_order_relaxed);
      } else {
        values[l] = computed[l];
      }
    }
  }

  int label(int64_t p) const {
    float belief[kMaxLabels];
    sum<false>(p, -1, belief);
    return static_cast<int>(std::min_element(belief, belief + grid_.labels) - belief);
  }

  const Grid& grid() const { return grid_; }

 private:
  template <bool kShared>
  static float get(const float& value) {
    if constexpr (kShared) return std::atomic_ref<float>(const_cast<float&>(value)).load(std::memory_order_relaxed);
    return value;
  }

  // The data of p and all messages to it but the one from `but`.
  template <bool kShared>
  void sum(int64_t p, int but, float* out) const {
    std::copy_n(grid_.data + p * grid_.labels, grid_.labels, out);
    for (int side = 0; side < kSides; ++side) {
      const float* const values = values_.data() + (p * kSides + side) * padded_;
      if (side == but) continue;
      for (int l = 0; l < grid_.labels; ++l) out[l] += get<kShared>(values[l]);
    }
  }

  Grid grid_;
  int padded_;
  std::vector<float> values_;  // zero, and so for ever, where there is no neighbour on that side
};

// Calls work(thread) on so many threads.
template <class Work>
void on_threads(int count, Work work) {
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
}

class Schedule {
 public:
  explicit Schedule(const Grid& grid, float tolerance) : messages_(grid), tolerance_(tolerance) {}
  virtual ~Schedule() = default;

  // Computes about so many messages, fewer when no residual is thought to exceed the tolerance any more. Returns how
  // many.
  virtual int64_t run(int64_t budget) = 0;

  const Messages& messages() const { return messages_; }

 protected:
  const Grid& grid() const { return messages_.grid(); }

  Messages messages_;
  float tolerance_;
};

class Synchronous : public Schedule {
 public:
  Synchronous(const Grid& grid, float tolerance, int threads)
      : Schedule(grid, tolerance), before_(grid), threads_(threads) {}

  int64_t run(int64_t budget) override {
    int64_t done = 0;
    while (done < budget && largest_ > tolerance_) {
      std::swap(before_, messages_);
      std::vector<float> largest(threads_);
      std::vector<int64_t> count(threads_);
      on_threads(threads_, [&](int thread) {
        float computed[kMaxLabels];
        for (int64_t id = bound(thread); id < bound(thread + 1); ++id) {
          if (grid().neighbour(id / kSides, id % kSides) < 0) continue;
          before_.compute<false>(id, computed);
          largest[thread] = std::max(largest[thread], before_.residual<false>(id, computed));
          messages_.put<false>(id, computed);
          ++count[thread];
        }
      });
      largest_ = *std::max_element(largest.begin(), largest.end());
      for (const int64_t n : count) done += n;
    }
    return done;
  }

 private:
  int64_t bound(int thread) const { return grid().messages() * thread / threads_; }

  Messages before_;
  int threads_;
  float largest_ = kNever;
};

class Fifo : public Schedule {
 public:
  Fifo(const Grid& grid, float tolerance) : Schedule(grid, tolerance), bound_(grid.messages()) {
    for (int64_t id = 0; id < grid.messages(); ++id) {
      if (grid.neighbour(id / kSides, id % kSides) < 0) continue;
      bound_[id] = kNever;
      waiting_.push_back(id);
    }
  }

  int64_t run(int64_t budget) override {
    float computed[kMaxLabels];
    int64_t done = 0;
    for (; done < budget && !waiting_.empty(); ++done) {
      const int64_t id = waiting_.front();
      waiting_.pop_front();
      bound_[id] = 0;
      messages_.compute<false>(id, computed);
      const float residual = messages_.residual<false>(id, computed);
      messages_.put<false>(id, computed);
      const int64_t to = id / kSides;
      for (int side = 0; side < kSides; ++side) {
        const int64_t next = grid().neighbour(to, side);
        if (side == id % kSides || next < 0) continue;
        float& bound = bound_[next * kSides + opposite(side)];
        const bool waits = bound > tolerance_;
        bound += residual;
        if (!waits && bound > tolerance_) waiting_.push_back(next * kSides + opposite(side));
      }
    }
    return done;
  }

 private:
  std::vector<float> bound_;
  std::deque<int64_t> waiting_;
};

class Residual : public Schedule {
 public:
  Residual(const Grid& grid, float tolerance, int threads, bool relaxed)
      : Schedule(grid, tolerance),
        bound_(std::make_unique<std::atomic<float>[]>(static_cast<size_t>(grid.messages()))),
        claimed_(std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(grid.messages()))),
        heap_(grid.messages(), foveal::Order::kMax),
        threads_(threads),
        relaxed_(relaxed) {
    std::vector<int64_t> ids;
    std::vector<double> first;
    for (int64_t id = 0; id < grid.messages(); ++id) {
      if (grid.neighbour(id / kSides, id % kSides) < 0) continue;
      // Messages begin at zero, so no residual exceeds what a message can span.
      bound_[id] = grid.edge(id / kSides, id % kSides) * static_cast<float>(grid.jump);
      ids.push_back(id);
      first.push_back(bound_[id]);
    }
    heap_.assign(ids, first);
  }

  int64_t run(int64_t budget) override {
    std::atomic<int64_t> done{0};
    std::atomic<int> busy{threads_};
    on_threads(threads_, [&](int thread) {
      threads_ == 1 ? work<false>(thread, budget, done, busy) : work<true>(thread, budget, done, busy);
    });
    return done;
  }

 private:
  template <bool kShared>
  void work(int thread, int64_t budget, std::atomic<int64_t>& done, std::atomic<int>& busy) {
    float computed[kMaxLabels];
    uint64_t random = static_cast<uint64_t>(thread);
    bool is_busy = true;
    while (done.load(std::memory_order_relaxed) < budget) {
      const auto first = relaxed_ ? heap_.pop_relaxed(random) : heap_.pop();
      if (!first) {
        // Others may still fill the heap; if nobody is busy, nobody will.
        if (is_busy) is_busy = false, --busy;
        if (busy == 0) break;
        std::this_thread::yield();
        continue;
      }
      if (!is_busy) is_busy = true, ++busy;
      const int64_t id = first->id;
      // Two threads at one message might put the older one last. The one that is at it looks again in the end.
      if (kShared && claimed_[id].exchange(true)) continue;
      // Before the messages are read, so that what comes in from now on counts anew; and by an exchange, which, unlike
      // a store, makes sure that what has come in before is seen.
      bound_[id].exchange(0);
      messages_.compute<kShared>(id, computed);
      const float residual = messages_.residual<kShared>(id, computed);
      messages_.put<kShared>(id, computed);
      if constexpr (kShared) {
        claimed_[id].store(false);
        if (const float bound = bound_[id].load(); bound > tolerance_) heap_.upsert(id, bound);
      }
      done.fetch_add(1, std::memory_order_relaxed);
      const int64_t to = id / kSides;
      for (int side = 0; side < kSides; ++side) {
        const int64_t next = grid().neighbour(to, side);
        if (side == id % kSides || next < 0) continue;
        const int64_t other = next * kSides + opposite(side);
        const float bound = bound_[other].fetch_add(residual) + residual;
        if (bound > tolerance_) heap_.upsert(other, bound);
      }
    }
    if (is_busy) --busy;
  }

  std::unique_ptr<std::atomic<float>[]> bound_;
  std::unique_ptr<std::atomic<bool>[]> claimed_;
  foveal::IndexedHeap heap_;
  int threads_;
  bool relaxed_;
};

}  // namespace

// Null when the arguments do not go together.
extern "C" void* bp_create(int height, int width, int labels, int jump, const float* data, const float* weight,
                           const char* schedule, float tolerance, int threads) {
  const Grid grid{height, width, labels, jump, data, weight};
  if (height < 1 || width < 1 || labels < 1 || grid.padded() > kMaxLabels || jump < 1 || jump > kMaxJump ||
      threads < 1) {
    return nullptr;
  }
  if (std::strcmp(schedule, "synchronous") == 0) return new Synchronous(grid, tolerance, threads);
  if (std::strcmp(schedule, "fifo") == 0 && threads == 1) return new Fifo(grid, tolerance);
  if (std::strcmp(schedule, "residual") == 0) return new Residual(grid, tolerance, threads, false);
  if (std::strcmp(schedule, "relaxed") == 0) return new Residual(grid, tolerance, threads, true);
  return nullptr;
}

extern "C" void bp_destroy(void* schedule) { delete static_cast<Schedule*>(schedule); }

extern "C" int64_t bp_run(void* schedule, int64_t budget) { return static_cast<Schedule*>(schedule)->run(budget); }

// The residuals as they are, by computing every message.
extern "C" void bp_residuals(void* schedule, float* out) {
  const Messages& messages = static_cast<Schedule*>(schedule)->messages();
  const Grid& grid = messages.grid();
  float computed[kMaxLabels];
  for (int64_t id = 0; id < grid.messages(); ++id) {
    out[id] = 0;
    if (grid.neighbour(id / kSides, id % kSides) < 0) continue;
    messages.compute<false>(id, computed);
    out[id] = messages.residual<false>(id, computed);
  }
}

extern "C" void bp_labels(void* schedule, int32_t* out) {
  const Messages& messages = static_cast<Schedule*>(schedule)->messages();
  for (int64_t p = 0; p < messages.grid().pixels(); ++p) out[p] = messages.label(p);
}
