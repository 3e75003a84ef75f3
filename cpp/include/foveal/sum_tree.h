// Sampling in proportion to weights that change: a tree of sums over dense ids (Wong and Easton 1980).
//
// Leaf i is the weight of id i, an inner node the sum of its 16 children, the root the total. A draw takes a point of
// [0, total) and goes down to the leaf in whose share it falls. A change computes the sums above it anew from their
// children and never adds a difference, so rounding does not accumulate: the tree is at any time bit for bit the one
// that would be built from its weights, and the total is within a relative 9 * 2^-53 for each level of the exact sum.
//
// Batches go level by level, so that the cache misses of different elements overlap, and compute each sum once where
// neighbours share it.
//
// Sequential: the caller excludes others. Preconditions, asserted in debug builds: 0 <= id < capacity, weights are
// finite, not negative and at most max_weight. Cost: O(log16 capacity); 8.6 bytes an id.
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace foveal {

class SumTree {
 public:
  static constexpr int64_t kMaxCapacity = int64_t{1} << 32;

  explicit SumTree(int64_t capacity) : capacity_(capacity) {
    if (capacity < 1 || capacity > kMaxCapacity) {
      throw std::invalid_argument("SumTree: capacity is " + std::to_string(capacity) + ", expected 1 to " +
                                  std::to_string(kMaxCapacity));
    }
    int64_t offset[kMaxLevels] = {};
    int64_t sums = 0;
    for (int64_t size = capacity;; size = groups(size)) {
      offset[top_] = sums;
      size_[top_] = size;
      sums += groups(size) * kFanout;
      if (size == 1) break;
      ++top_;
    }
    sums_.reset(new (std::align_val_t{kAlignment}) double[static_cast<size_t>(sums)]());
    for (int level = 0; level <= top_; ++level) level_[level] = sums_.get() + offset[level];
    nbytes_ = sums * static_cast<int64_t>(sizeof(double));
  }

  int64_t capacity() const { return capacity_; }
  int64_t nbytes() const { return nbytes_; }
  double total() const { return *level_[top_]; }
  int64_t num_positive() const { return num_positive_; }
  std::span<const double> weights() const { return {level_[0], static_cast<size_t>(capacity_)}; }

  // So that no sum overflows.
  double max_weight() const { return std::numeric_limits<double>::max() / (2.0 * static_cast<double>(capacity_)); }

  double operator[](int64_t id) const {
    assert(0 <= id && id < capacity_);
    return level_[0][id];
  }

  void set(int64_t id, double weight) {
    put(id, weight);
    for (int level = 1; level <= top_; ++level) {
      id >>= kLogFanout;
      level_[level][id] = sum_of_children(level, id);
    }
  }

  // In order: of duplicate ids the last counts.
  void set_many(std::span<const int64_t> ids, std::span<const double> weights) {
    assert(ids.size() == weights.size());
    for (size_t i = 0; i < ids.size(); ++i) put(ids[i], weights[i]);
    int level = 1;
    int shift = kLogFanout;
    // Up to where there are fewer sums than elements.
    for (; level <= top_ && size_[level] > static_cast<int64_t>(ids.size()); ++level, shift += kLogFanout) {
      double* const sums = level_[level];  // not read anew after each store
      const double* const children = level_[level - 1];
      int64_t last = -1;
      for (const int64_t id : ids) {
        const int64_t index = id >> shift;
        if (index != last) sums[index] = sum_of(children + (index << kLogFanout));
        last = index;
      }
    }
    add_up_from(level);
  }

  // Makes the tree whole again where a call was cut off, as by a fork in another thread: puts back what was drawn and
  // computes all sums, and the number of positive weights, anew.
  void rebuild() {
    for (const auto& [id, weight] : drawn_) level_[0][id] = weight;
    drawn_.clear();
    num_positive_ = std::count_if(level_[0], level_[0] + capacity_, [](double weight) { return weight > 0; });
    add_up_from(1);
  }

  // The id in whose share `point` lies, 0 <= point < total; never one of weight 0. Not without a positive weight.
  int64_t find(double point) const {
    int64_t id = 0;
    for (int level = top_; level > 0; --level) go_down(level, id, point);
    return id;
  }

  // The same for many. `points` is used up.
  void find_many(std::span<double> points, std::span<int64_t> ids) const {
    assert(points.size() == ids.size());
    std::fill(ids.begin(), ids.end(), 0);
    for (int level = top_; level > 0; --level) {
      for (size_t i = 0; i < ids.size(); ++i) {
        go_down(level, ids[i], points[i]);
        if (level > 1) {
          const double* child = level_[level - 2] + (ids[i] << kLogFanout);
          __builtin_prefetch(child);
          __builtin_prefetch(child + kFanout / 2);
        }
      }
    }
  }

  // As many draws as `points`, each from [0, 1), in sequence and without replacement; `probabilities` are those of each
  // draw among what was left. There are at least so many positive weights. The tree is left as it was.
  void draw_without_replacement(std::span<const double> points, std::span<int64_t> ids,
                                std::span<double> probabilities) {
    assert(static_cast<int64_t>(points.size()) <= num_positive_);
    drawn_.reserve(points.size());
    for (size_t i = 0; i < points.size(); ++i) {
      const int64_t id = find(points[i] * total());
      const double weight = (*this)[id];
      ids[i] = id;
      probabilities[i] = weight / total();
      drawn_.push_back({id, weight});
      std::atomic_signal_fence(std::memory_order_seq_cst);  // noted before it is taken out
      set(id, 0.0);
    }
    for (const auto& [id, weight] : drawn_) set(id, weight);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    drawn_.clear();
  }

 private:
  static constexpr int kLogFanout = 4;
  static constexpr int64_t kFanout = 1 << kLogFanout;
  static constexpr size_t kAlignment = kFanout * sizeof(double);
  static constexpr int kMaxLevels = 10;

  static int64_t groups(int64_t size) { return (size + kFanout - 1) >> kLogFanout; }

  void put(int64_t id, double weight) {
    assert(0 <= id && id < capacity_ && 0 <= weight && weight <= max_weight());
    double& leaf = level_[0][id];
    num_positive_ += (weight > 0) - (leaf > 0);
    leaf = weight + 0.0;  // -0.0 becomes 0.0
  }

  double sum_of_children(int level, int64_t index) const { return sum_of(level_[level - 1] + (index << kLogFanout)); }

  // In a fixed order, by halves.
  static double sum_of(const double* child) {
    double sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = child[i] + child[i + 8];
    for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }

  void add_up_from(int level) {
    for (; level <= top_; ++level) {
      for (int64_t i = 0; i < size_[level]; ++i) level_[level][i] = sum_of_children(level, i);
    }
  }

  // From the node `index` at `level` to the child in whose share `point` lies, and to the point within that: first to
  // one of four fours, then within that. No branch depends on the point, and no chain of additions is longer than four.
  void go_down(int level, int64_t& index, double& point) const {
    const double* child = level_[level - 1] + (index << kLogFanout);
    double sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = (child[4 * i] + child[4 * i + 1]) + (child[4 * i + 2] + child[4 * i + 3]);
    int64_t place = 4 * pass(sum, point);
    place += pass(child + place, point);
    if (child[place] == 0) {  // sums in another order round differently: a neighbour, then, that has a share
      while (place > 0 && child[place] == 0) --place;
      while (child[place] == 0) ++place;
      point = child[place];
    }
    index = (index << kLogFanout) + place;
  }

  // Which of four shares in a row `point` lies in, the last if beyond; takes those before it off the point.
  static int64_t pass(const double* share, double& point) {
    const double begin[4] = {0.0, share[0], share[0] + share[1], share[0] + share[1] + share[2]};
    const int64_t place = (point >= begin[1]) + (point >= begin[2]) + (point >= begin[3]);
    point -= begin[place];
    return place;
  }

  struct Drawn {
    int64_t id;
    double weight;
  };

  struct AlignedDelete {
    void operator()(double* sums) const { ::operator delete[](sums, std::align_val_t{kAlignment}); }
  };

  std::unique_ptr<double[], AlignedDelete> sums_;
  double* level_[kMaxLevels] = {};
  int64_t size_[kMaxLevels] = {};
  int64_t capacity_;
  int64_t num_positive_ = 0;
  int64_t nbytes_ = 0;
  std::vector<Drawn> drawn_;  // without replacement, and not put back yet
  int top_ = 0;
};

}  // namespace foveal
