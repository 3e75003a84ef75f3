// Runs the backward pass: what every row needs first, then the sums of all gradients.
//
// An item of work is a range of keys of one head: it owns dk and dv there, which it sums over all rows, and adds to dq
// block of rows by block of rows. Where a head has several ranges, they add to a block of dq in their order: range n
// waits for range n - 1, which was handed out before it, so somebody always moves on. All sums run in the same order
// however keys are cut, so the cut may follow the number of threads and the bits do not.
//
// dbias has one owner too: heads and batches that share a slice of it are one item, done one after the other.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attention/divide_up.h"
#include "attention/heads.h"
#include "attention/plan.h"
#include "attention/scratch.h"
#include "attention/threads.h"
#include "foveal/attention.h"
#include "isa/detect.h"
#include "kernels/kernel_table.h"

namespace foveal {
namespace {

constexpr int64_t kKeysWorthAnItem = 256;

struct Range {
  int64_t begin, end;
};

// The keys that the rows [begin, end) may see, by position and length.
Range visible_keys(const HeadTask& h, Range rows) {
  const int64_t first = h.q_offset + rows.begin / h.group, last = h.q_offset + (rows.end - 1) / h.group;
  const Range keys = {std::clamp<int64_t>(first - h.window_left, 0, h.kv_len),
                      std::clamp<int64_t>(last + h.window_right + 1, 0, h.kv_len)};
  return {keys.begin, std::max(keys.begin, keys.end)};
}

template <class T>
class BackwardRun {
 public:
  BackwardRun(const CanonicalGradients& g, const RowKernels& kernels, const ExecutionOptions& options)
      : p_(g.problem), g_(g), kernels_(kernels), options_(options), heads_(g.problem) {}

  Status operator()() {
    const bool empty = p_.q.shape[2] == 0 && p_.k.shape[2] == 0;  // whose batch may be larger than any list of it
    if (!empty && kv_heads() > 0)
      for (int64_t b = 0; b < p_.q.shape[0]; ++b) sequences_.push_back(sequence_at(p_, b));
    clear();
    if (sequences_.empty()) return {};
    cut();
    Team& team = team_.emplace(options_, items(), flops());
    if (Status status = allocate(team.size()); !status.ok()) return status;
    const Status status = team.run([&](int thread) {
      if (parts_ > 1) {  // several items need the same rows
        prepare_rows(thread);
        team.barrier();
      }
      work(thread);
    });
    if (status.ok()) {
      add_up_sinks();
      add_up_rows(g_.dgate_tau, kGateTauSum);
      add_up_rows(g_.dgate_temperature, kGateTemperatureSum);
      add_up_rows(g_.dspan, kSpanSum);
      add_up_additive();
    }
    return status;
  }

 private:
  int64_t kv_heads() const { return p_.k.shape[1]; }
  int64_t group() const { return heads_.group(); }
  int64_t rows_of(int64_t b) const { return sequences_[static_cast<size_t>(b)].q_len * group(); }

  // ---- what no item writes: zeros
  // -------------------------------------------------------------------------------------

  void clear() {
    for_each_padding(p_, [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t h = 0; h < p_.q.shape[1]; ++h) fill_zero(g_.dq, b, h, begin, end);
    });
    for_each_key_padding(p_, [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t h = 0; h < kv_heads(); ++h) {
        fill_zero(g_.dk, b, h, begin, end);
        fill_zero(g_.dv, b, h, begin, end);
      }
    });
    if (g_.dbias.present()) {
      TensorView own = g_.dbias;  // every element once
      for (int axis = 0; axis < 4; ++axis)
        if (own.stride[axis] == 0) own.shape[axis] = 1;  // the array has an element there even where Sq or Skv is 0
      for (int64_t b = 0; b < own.shape[0]; ++b)
        for (int64_t h = 0; h < own.shape[1]; ++h) fill_zero(own, b, h, 0, own.shape[2]);
    }
    for (const TensorView* view : {&g_.dgate_tau, &g_.dgate_temperature, &g_.dspan})
      if (view->present()) store_sums(*view, std::vector<double>(static_cast<size_t>(elements_of(*view))));
    if (g_.dadditive.present())
      store_sums(g_.dadditive, std::vector<double>(static_cast<size_t>(elements_of(g_.dadditive))));
    if (g_.dsinks.present())
      for (int64_t h = 0; h < g_.dsinks.shape[0]; ++h)
        *static_cast<T*>(address_of(g_.dsinks, h * g_.dsinks.stride[0])) = 0;
  }

  // ---- items: owners of dbias (heads, where there is none) by parts of their keys
  // ---------------------------------------

  void cut() {
    const bool shared_batch = g_.dbias.present() && g_.dbias.stride[0] == 0;
    const bool shared_heads = g_.dbias.present() && g_.dbias.stride[1] == 0;
    batches_an_owner_ = shared_batch ? p_.q.shape[0] : 1;
    heads_an_owner_ = shared_heads ? kv_heads() : 1;
    owners_ = p_.q.shape[0] / batches_an_owner_ * (kv_heads() / heads_an_owner_);

    const int64_t tile = kernels_.rows_per_tile;
    rows_a_block_ = std::min(divide_up(kRowsSharingKeys, tile), divide_up(p_.q.shape[2] * group(), tile)) * tile;
    rows_a_block_ = std::max(rows_a_block_, tile);
    row_blocks_ = divide_up(p_.q.shape[2] * group(), rows_a_block_);

    const int64_t threads = options_.num_threads;
    int64_t longest = 0;
    for (const Sequence& s : sequences_) longest = std::max(longest, s.kv_len);
    const bool even = owners_ >= kItemsAThread * threads || owners_ % threads == 0;
    const bool sums_over_keys = g_.dbias.present() && g_.dbias.stride[3] == 0;  // which must run in their order
    parts_ = even || sums_over_keys ? 1
                                    : std::clamp<int64_t>(divide_up(kItemsAThread * threads, owners_), 1,
                                                          std::max<int64_t>(divide_up(longest, kKeysWorthAnItem), 1));
    longest_part_ = part_length(longest);
  }

  int64_t items() const { return owners_ * parts_; }
  int64_t part_length(int64_t kv_len) const {
    return parts_ == 1 ? kv_len : divide_up(divide_up(kv_len, parts_), kKeysWorthAnItem) * kKeysWorthAnItem;
  }

  double flops() const {
    double sum = 0;
    for (int64_t b = 0; b < p_.q.shape[0]; ++b)
      sum += static_cast<double>(rows_of(b)) * static_cast<double>(sequences_[static_cast<size_t>(b)].kv_len);
    return sum * static_cast<double>(kv_heads()) * static_cast<double>(6 * p_.q.shape[3] + 4 * p_.v.shape[3]);
  }

  // ---- memory: of the rows (lse, delta), of dq where parts share it, of each thread
  // -----------------------------------

  Status allocate(int threads) {
    const HeadTask h = heads_.task(0, 0);
    const auto size = static_cast<int64_t>(sizeof(T));
    const auto rounded = [](int64_t nbytes) { return divide_up(nbytes, 128) * 128; };
    const int64_t num_heads = p_.q.shape[0] * kv_heads(), rows = p_.q.shape[2] * group();
    sums_of_row_ = p_.q.shape[3] * (p_.additive.present() ? 2 : 1) + (sums_rows() ? int64_t{kRowSums} : 0);
    const int64_t block = rows_a_block_ * sums_of_row_ * size;
    const int64_t head_sums = parts_ == 1 ? 0 : block * row_blocks_;
    key_sums_nbytes_ = rounded(longest_part_ * kernels_.key_sums_width(h) * size);
    dq_sums_nbytes_ = rounded(parts_ == 1 ? block : 0);
    HeadTask longest = h;
    for (const Sequence& s : sequences_) longest.kv_len = std::max(longest.kv_len, s.kv_len);
    thread_nbytes_ =
        key_sums_nbytes_ + dq_sums_nbytes_ +
        rounded(std::max(kernels_.backward_scratch_nbytes(h, rows_a_block_), kernels_.terms_scratch_nbytes(longest)));
    const int64_t rows_nbytes = num_heads * (kTerms + (sums_rows() ? int64_t{kRowSums} : 0)) * rows * size;
    const int64_t additive_nbytes = g_.dadditive.present() ? num_heads * rows * p_.q.shape[3] * size : 0;
    additive_memory_ = allocate_scratch(additive_nbytes);
    const int64_t total = rows_nbytes + additive_nbytes + num_heads * head_sums + threads * thread_nbytes_;
    rows_memory_ = allocate_scratch(rows_nbytes);
    dq_memory_ = allocate_scratch(num_heads * head_sums);
    thread_memory_ = allocate_scratch(threads * thread_nbytes_);
    if (rows_memory_ == nullptr || additive_memory_ == nullptr || dq_memory_ == nullptr || thread_memory_ == nullptr) {
      return {ErrorKind::kMemory, "cannot allocate " + std::to_string(total) + " bytes of scratch memory"};
    }
    if (parts_ > 1) turn_ = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(num_heads * row_blocks_));
    if (g_.dsinks.present()) sink_sums_.resize(static_cast<size_t>(p_.q.shape[0] * p_.q.shape[1]));
    return {};
  }

  static constexpr int64_t kTerms = 5;  // shift, threshold, delta, and those of the entropy

  // A term of the rows of a head.
  T* rows_memory(int64_t b, int64_t kv_head, int64_t term) const {
    return reinterpret_cast<T*>(rows_memory_.get()) +
           ((b * kv_heads() + kv_head) * kTerms + term) * p_.q.shape[2] * group();
  }

  // Whether the gradients of a gate or a span are asked for.
  bool sums_rows() const { return g_.dgate_tau.present() || g_.dgate_temperature.present() || g_.dspan.present(); }

  // A sum (RowSum) of the rows of a head.
  T* row_sums(int64_t b, int64_t kv_head, int64_t sum) const {
    const int64_t num_heads = p_.q.shape[0] * kv_heads(), rows = p_.q.shape[2] * group();
    return reinterpret_cast<T*>(rows_memory_.get()) + num_heads * kTerms * rows +
           ((b * kv_heads() + kv_head) * kRowSums + sum) * rows;
  }

  std::byte* scratch(int thread) const {
    return thread_memory_.get() + thread * thread_nbytes_ + key_sums_nbytes_ + dq_sums_nbytes_;
  }

  GradientHead gradient_head(const HeadTask& h, int64_t b, int64_t kv_head) const {
    const int64_t q_head = kv_head * group();
    const Sequence& s = sequences_[static_cast<size_t>(b)];
    const auto at = [b](const TensorView& view, int64_t head, int64_t row = 0) {
      return address_of(view, b * view.stride[0] + head * view.stride[1] + row * view.stride[2]);
    };
    GradientHead g = {};
    g.head = &h;
    g.dout = at(g_.dout, q_head, s.q_begin);
    g.dout_stride_s = g_.dout.stride[2];
    g.dout_stride_g = g_.dout.stride[1];
    g.dout_stride_d = g_.dout.stride[3];
    g.shift = rows_memory(b, kv_head, 0);
    g.threshold = rows_memory(b, kv_head, 1);
    g.delta = rows_memory(b, kv_head, 2);
    if (g_.dentropy.present()) {
      g.entropy_slope = rows_memory(b, kv_head, 3);
      g.entropy_shift = rows_memory(b, kv_head, 4);
    }
    g.dq = at(g_.dq, q_head, s.q_begin);
    g.dq_stride_s = g_.dq.stride[2];
    g.dq_stride_g = g_.dq.stride[1];
    g.dq_stride_d = g_.dq.stride[3];
    g.dk = at(g_.dk, kv_head, s.kv_begin);
    g.dk_stride_s = g_.dk.stride[2];
    g.dk_stride_d = g_.dk.stride[3];
    g.dv = at(g_.dv, kv_head, s.kv_begin);
    g.dv_stride_s = g_.dv.stride[2];
    g.dv_stride_d = g_.dv.stride[3];
    if (sums_rows()) {
      g.row_sums = row_sums(b, kv_head, 0);
      g.row_sums_stride = p_.q.shape[2] * group();
    }
    if (g_.dadditive.present())
      g.additive_sums = reinterpret_cast<T*>(additive_memory_.get()) +
                        (b * kv_heads() + kv_head) * p_.q.shape[2] * group() * p_.q.shape[3];
    if (g_.dbias.present()) {
      g.dbias = at(g_.dbias, q_head);
      g.dbias_stride_s = g_.dbias.stride[2];
      g.dbias_stride_g = g_.dbias.stride[1];
      g.dbias_stride_k = g_.dbias.stride[3];
    }
    return g;
  }

  // ---- first, or with the one item of a head: lse and delta of its rows, and the sums of the sinks' gradients
  // ------------------------------------------

  void prepare_rows(int thread) {
    const int64_t num_heads = p_.q.shape[0] * kv_heads();
    for (;;) {
      const int64_t index = next_head_.fetch_add(1, std::memory_order_relaxed);
      if (index >= num_heads || team_->stopped()) return;
      prepare_rows(index / kv_heads(), index % kv_heads(), scratch(thread));
      team_->poll(thread);
    }
  }

  void prepare_rows(int64_t b, int64_t kv_head, std::byte* scratch) {
    const HeadTask h = heads_.task(b, kv_head);
    const GradientHead g = gradient_head(h, b, kv_head);
    GradientTask task = {};
    task.grads = &g;
    task.row_end = rows_of(b);
    task.scratch = scratch;
    if (g_.dentropy.present()) prepare_entropy(g, b, kv_head, task.row_end);
    kernels_.backward_terms(task);
    if (has_threshold(p_.normalizer) || is_pointwise(p_.normalizer)) return;  // nothing was saved of the rows
    T* lse = static_cast<T*>(g.shift);
    T* delta = static_cast<T*>(g.delta);
    for (int64_t r = 0; r < task.row_end; ++r) {
      const int64_t i = sequences_[static_cast<size_t>(b)].q_begin + r / group(),
                    head = kv_head * group() + r % group();
      const auto of_row = [&](const TensorView& view) {
        return *static_cast<const T*>(
            address_of(view, b * view.stride[0] + head * view.stride[1] + i * view.stride[2]));
      };
      const double natural = of_row(p_.lse);
      if (g_.dlse.present()) delta[r] -= of_row(g_.dlse);
      lse[r] = natural == -INFINITY ? T{0} : static_cast<T>(natural * M_LOG2E);
      if (!sink_sums_.empty() && natural != -INFINITY)
        sink_sums_[static_cast<size_t>(b * p_.q.shape[1] + head)] -=
            std::exp(std::min(h.sinks[r % group()] - natural, 0.0)) * static_cast<double>(delta[r]);
    }
  }

  // With p = w / W and W = sum w, dH/dw_j = -(log p_j + H) / W.
  void prepare_entropy(const GradientHead& g, int64_t b, int64_t kv_head, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = kv_head * group() + r % group();
      const int64_t i = sequences_[static_cast<size_t>(b)].q_begin + r / group();
      const auto of_row = [&](const TensorView& view) {
        return static_cast<double>(
            *static_cast<const T*>(address_of(view, b * view.stride[0] + head * view.stride[1] + i * view.stride[2])));
      };
      const double mass = of_row(p_.mass), slope = mass == 0 ? 0 : of_row(g_.dentropy) / mass;
      static_cast<T*>(g.entropy_slope)[r] = static_cast<T>(slope * M_LN2);
      static_cast<T*>(g.entropy_shift)[r] =
          static_cast<T>(slope == 0 ? 0 : slope * (of_row(p_.entropy) - std::log(mass)));
    }
  }

  void add_up_sinks() {
    if (sink_sums_.empty()) return;
    for (int64_t head = 0; head < p_.q.shape[1]; ++head) {
      double sum = 0;
      for (int64_t b = 0; b < p_.q.shape[0]; ++b) sum += sink_sums_[static_cast<size_t>(b * p_.q.shape[1] + head)];
      *static_cast<T*>(address_of(g_.dsinks, head * g_.dsinks.stride[0])) = static_cast<T>(sum);
    }
  }

  // A canonical view of rank 1 to 3, whose axes of stride 0 have one element.
  int64_t elements_of(const TensorView& view) const {
    int64_t count = 1;
    for (int axis = 0; axis < view.rank; ++axis) count *= extent_of(view, axis);
    return count;
  }
  int64_t extent_of(const TensorView& view, int axis) const {
    if (view.stride[axis] == 0) return 1;
    return p_.packed() && axis == 2 ? p_.packed_rows : view.shape[axis];
  }

  // The place among these elements of one that has the index `at`.
  size_t place_of(const TensorView& view, const int64_t (&at)[3]) const {
    int64_t place = 0;
    for (int axis = 0; axis < view.rank; ++axis)
      if (view.stride[axis] != 0) place = place * extent_of(view, axis) + at[axis];
    return static_cast<size_t>(place);
  }

  void store_sums(const TensorView& view, const std::vector<double>& sums) const {
    if (sums.empty()) return;
    int64_t at[3] = {};
    for (const double sum : sums) {
      int64_t offset = 0;
      for (int axis = 0; axis < view.rank; ++axis) offset += at[axis] * view.stride[axis];
      *static_cast<T*>(address_of(view, offset)) = static_cast<T>(sum);
      for (int axis = view.rank - 1; axis >= 0; --axis) {
        if (++at[axis] < extent_of(view, axis)) break;
        at[axis] = 0;
      }
    }
  }

  void add_up_additive() const {
    if (!g_.dadditive.present()) return;
    const int64_t dim = p_.q.shape[3];
    std::vector<double> sums(static_cast<size_t>(elements_of(g_.dadditive)));
    for (int64_t b = 0; b < p_.q.shape[0]; ++b)
      for (int64_t kv_head = 0; kv_head < kv_heads(); ++kv_head) {
        const T* row = reinterpret_cast<const T*>(additive_memory_.get()) +
                       (b * kv_heads() + kv_head) * p_.q.shape[2] * group() * dim;
        for (int64_t r = 0; r < rows_of(b); ++r, row += dim)
          for (int64_t a = 0; a < dim; ++a) {
            const int64_t at[3] = {kv_head * group() + r % group(), a, 0};
            sums[place_of(g_.dadditive, at)] += static_cast<double>(row[a]);
          }
      }
    store_sums(g_.dadditive, sums);
  }

  // A gradient that the items have summed row by row, over the axes along which its input has one element for all.
  void add_up_rows(const TensorView& view, RowSum which) const {
    if (!view.present()) return;
    std::vector<double> sums(static_cast<size_t>(elements_of(view)));
    for (int64_t b = 0; b < p_.q.shape[0]; ++b)
      for (int64_t kv_head = 0; kv_head < kv_heads(); ++kv_head) {
        const T* rows = row_sums(b, kv_head, which);
        for (int64_t r = 0; r < rows_of(b); ++r) {
          const int64_t head = kv_head * group() + r % group();
          const int64_t i = sequences_[static_cast<size_t>(b)].q_begin + r / group();
          // By (B,Hq,Sq), by (B,Hq), or by (Hq,).
          const int64_t at[3] = {view.rank == 1 ? head : b, head, i};
          sums[place_of(view, at)] += static_cast<double>(rows[r]);
        }
      }
    store_sums(view, sums);
  }

  // ---- then: the items
  // --------------------------------------------------------------------------------------------------

  void work(int thread) {
    std::byte* memory = thread_memory_.get() + thread * thread_nbytes_;
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= items() || team_->stopped()) return;
      // Part by part: the parts of one head, which wait for each other, are far apart.
      const int64_t part = index / owners_, owner = index % owners_;
      const int64_t owners_a_batch = kv_heads() / heads_an_owner_;
      const int64_t batch = owner / owners_a_batch * batches_an_owner_, head = owner % owners_a_batch * heads_an_owner_;
      for (int64_t b = batch; b < batch + batches_an_owner_; ++b)
        for (int64_t kv_head = head; kv_head < head + heads_an_owner_; ++kv_head) run(b, kv_head, part, memory, thread);
    }
  }

  void run(int64_t b, int64_t kv_head, int64_t part, std::byte* memory, int thread) {
    if (parts_ == 1) prepare_rows(b, kv_head, scratch(thread));
    const HeadTask h = heads_.task(b, kv_head);
    const GradientHead g = gradient_head(h, b, kv_head);
    const int64_t length = part_length(h.kv_len), rows = rows_of(b), head_index = b * kv_heads() + kv_head;
    GradientTask task = {};
    task.grads = &g;
    task.key_begin = std::min(part * length, h.kv_len);
    task.key_end = std::min(task.key_begin + length, h.kv_len);
    task.key_sums = memory;
    task.scratch = scratch(thread);
    std::memset(task.key_sums, 0,
                static_cast<size_t>((task.key_end - task.key_begin) * kernels_.key_sums_width(h)) * sizeof(T));
    for (int64_t block = 0; block * rows_a_block_ < rows; ++block) {
      task.row_begin = block * rows_a_block_;
      task.row_end = std::min(task.row_begin + rows_a_block_, rows);
      const Range keys = visible_keys(h, {task.row_begin, task.row_end});
      // The parts that see the block take turns at it; one that nobody sees is the first part's, to become 0.
      const int64_t first = keys.begin < keys.end ? keys.begin / length : 0;
      const int64_t last = keys.begin < keys.end ? (keys.end - 1) / length : 0;
      if (part < first || part > last) continue;
      task.first = part == first;
      task.last = part == last;
      task.dq_sums = memory + key_sums_nbytes_;
      if (parts_ > 1) {
        task.dq_sums = dq_memory_.get() + (head_index * row_blocks_ + block) * rows_a_block_ * sums_of_row_ *
                                              static_cast<int64_t>(sizeof(T));
        if (!task.first && !wait_for_turn(head_index * row_blocks_ + block, part, thread)) return;
      }
      kernels_.backward(task);
      // release: pairs with the acquire in wait_for_turn; the next part reads these sums.
      if (!task.last)
        turn_[static_cast<size_t>(head_index * row_blocks_ + block)].store(part + 1, std::memory_order_release);
      team_->poll(thread);
      if (team_->stopped()) return;
    }
    kernels_.backward_keys(task);
  }

  bool wait_for_turn(int64_t block, int64_t part, int thread) {
    const std::atomic<int64_t>& turn = turn_[static_cast<size_t>(block)];
    while (turn.load(std::memory_order_acquire) != part) {
      team_->poll(thread);
      if (team_->stopped()) return false;
      std::this_thread::yield();
    }
    return true;
  }

  const CanonicalProblem& p_;
  const CanonicalGradients& g_;
  const RowKernels& kernels_;
  const ExecutionOptions& options_;
  const Heads heads_;
  std::vector<Sequence> sequences_;

  int64_t batches_an_owner_ = 1, heads_an_owner_ = 1, owners_ = 0, parts_ = 1;
  int64_t rows_a_block_ = 0, row_blocks_ = 0, longest_part_ = 0;
  int64_t sums_of_row_ = 0, key_sums_nbytes_ = 0, dq_sums_nbytes_ = 0, thread_nbytes_ = 0;
  Scratch rows_memory_, additive_memory_, dq_memory_, thread_memory_;
  std::vector<double> sink_sums_;                 // (B, Hq)
  std::unique_ptr<std::atomic<int64_t>[]> turn_;  // (head, row block): the part that may add to dq next
  std::atomic<int64_t> next_head_{0}, next_{0};
  std::optional<Team> team_;
};

}  // namespace

Status attention_backward(const CanonicalGradients& gradients, const ExecutionOptions& options) try {
  Status status;
  const KernelTable* table = options.table != nullptr ? options.table : active_table(status);
  if (!status.ok()) return status;
  const DType dtype = gradients.problem.q.dtype;
  const RowKernels& kernels = kernels_for(*table, dtype);
  if (dtype == DType::kFloat64) return BackwardRun<double>(gradients, kernels, options)();
  return BackwardRun<float>(gradients, kernels, options)();
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "cannot allocate memory for the work plan"};
} catch (const std::length_error&) {
  return {ErrorKind::kMemory, "cannot allocate memory for the work plan"};
}

}  // namespace foveal
