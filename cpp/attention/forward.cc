// Runs a forward plan: prepares the heads, spreads the work items over threads, merges split key ranges.
//
// Threads take items from one counter; an item's result does not depend on who computes it. The parts of a split row
// block are merged in order by whoever finishes the last of them.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention/divide_up.h"
#include "attention/element.h"
#include "attention/heads.h"
#include "attention/plan.h"
#include "attention/scratch.h"
#include "attention/threads.h"
#include "foveal/attention.h"
#include "isa/detect.h"
#include "kernels/kernel_table.h"

namespace foveal {
namespace {

void write_lse(const TensorView& lse, int64_t b, int64_t h, int64_t i, double max2, double sum) {
  const double value = sum == 0 ? -INFINITY : max2 * M_LN2 + std::log(sum);
  const int64_t at = b * lse.stride[0] + h * lse.stride[1] + i * lse.stride[2];
  if (lse.dtype == DType::kFloat64)
    static_cast<double*>(lse.data)[at] = value;
  else
    static_cast<float*>(lse.data)[at] = static_cast<float>(value);
}

void write(const TensorView& view, int64_t b, int64_t h, int64_t i, double value) {
  if (view.present()) store_element(view, b * view.stride[0] + h * view.stride[1] + i * view.stride[2], value);
}

const TensorView& stat_of(const CanonicalProblem& p, int stat) {
  return stat == kRowEntropy     ? p.entropy
         : stat == kRowMass      ? p.mass
         : stat == kRowMaxWeight ? p.max_weight
                                 : p.threshold;
}

double unseen_threshold(const CanonicalProblem& p) { return has_threshold(p.normalizer) ? INFINITY : 0.0; }

int64_t& argmax_at(const CanonicalProblem& p, int64_t b, int64_t h, int64_t i) {
  const TensorView& view = p.argmax;
  return static_cast<int64_t*>(view.data)[b * view.stride[0] + h * view.stride[1] + i * view.stride[2]];
}

// The results of a key that nobody sees, and of queries whose keys are not found yet.
void clear_reads(const CanonicalProblem& p) {
  const auto each_row = [](const TensorView& view, auto visit) {
    for (int64_t b = 0; b < view.shape[0]; ++b)
      for (int64_t h = 0; h < view.shape[1]; ++h)
        for (int64_t i = 0; i < view.shape[2]; ++i) visit(b * view.stride[0] + h * view.stride[1] + i * view.stride[2]);
  };
  if (p.key_mass.present()) each_row(p.key_mass, [&](int64_t at) { store_element(p.key_mass, at, 0.0); });
  if (!p.top_keys.present()) return;
  each_row(p.top_keys, [&](int64_t at) {
    for (int64_t x = 0; x < p.top_keys.shape[3]; ++x)
      static_cast<int64_t*>(p.top_keys.data)[at + x * p.top_keys.stride[3]] = -1;
  });
  each_row(p.top_weights, [&](int64_t at) {
    for (int64_t x = 0; x < p.top_weights.shape[3]; ++x)
      store_element(p.top_weights, at + x * p.top_weights.stride[3], 0.0);
  });
}

// Rows that no sequence has, of every head.
void finish_padding(const CanonicalProblem& p) {
  for_each_padding(p, [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t h = 0; h < p.q.shape[1]; ++h) {
      fill_zero(p.out, b, h, begin, end);
      fill_zero(p.weights, b, h, begin, end);
      for (int64_t i = begin; i < end; ++i) {
        if (p.lse.present()) write_lse(p.lse, b, h, i, 0, 0);
        for (int m = 0; m < kRowStats; ++m)
          write(stat_of(p, m), b, h, i, m == kRowThreshold ? unseen_threshold(p) : 0.0);
        if (p.argmax.present()) argmax_at(p, b, h, i) = -1;
      }
    }
  });
}

// ---- one call -------------------------------------------------------------------------------------------------------

class ForwardRun {
 public:
  ForwardRun(const CanonicalProblem& p, const Plan& plan, const ExecutionOptions& options)
      : p_(p), plan_(plan), options_(options), heads_(p) {
    accumulator_nbytes_ = p.q.dtype == DType::kFloat64 ? 8 : 4;
  }

  Status operator()() {
    finish_padding(p_);
    if (plan_.items == 0) return {};

    Team& team = team_.emplace(options_, plan_.items, plan_.flops);
    measure_scratch();
    const int64_t partial_nbytes = plan_.partial_rows * (p_.v.shape[3] + kRowMembers) * accumulator_nbytes_;
    const Scratch scratch = allocate_scratch(scratch_nbytes_ * team.size());
    // A call on tiny arrays has no time for memory that it does not need.
    const Scratch partial = partial_nbytes > 0 ? allocate_scratch(partial_nbytes) : nullptr;
    const int64_t mass_nbytes = p_.key_mass.present() ? plan_.items * mass_nbytes_an_item() : 0;
    const Scratch mass = mass_nbytes > 0 ? allocate_scratch(mass_nbytes) : nullptr;
    if (scratch == nullptr || (partial_nbytes > 0 && partial == nullptr) || (mass_nbytes > 0 && mass == nullptr))
      return {ErrorKind::kMemory, "cannot allocate " +
                                      std::to_string(scratch_nbytes_ * team.size() + partial_nbytes + mass_nbytes) +
                                      " bytes of scratch memory"};
    partial_ = partial.get();
    mass_ = mass.get();
    if (mass_nbytes > 0) std::memset(mass_, 0, static_cast<size_t>(mass_nbytes));
    if (plan_.groups > 0) pending_ = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(plan_.groups));

    const Status status = team.run([&](int thread) { work(scratch.get() + scratch_nbytes_ * thread, thread); });
    if (status.ok() && p_.key_mass.present()) add_up_mass();
    return status;
  }

 private:
  void measure_scratch() {
    HeadTask h = heads_.task(0, 0);
    int64_t kernel = 0;
    rows_max_ = 0;
    for (const SequencePlan& s : plan_.sequences) {
      h.kv_len = s.kv_len;
      const int64_t rows = std::min(s.rows_per_call, s.rows);
      rows_max_ = std::max(rows_max_, rows);
      heads_max_ = std::max(heads_max_, s.heads_together);
      kernel = std::max(kernel, s.decode ? plan_.kernels->decode_scratch_nbytes(h, s.heads_together)
                                         : plan_.kernels->forward_scratch_nbytes(h, rows));
    }
    // The kernel's own, then the state of the rows; a whole number of cache lines a thread.
    kernel_nbytes_ = kernel;
    state_nbytes_ = divide_up(kRowMembers * heads_max_ * rows_max_ * accumulator_nbytes_, 64) * 64;
    const int64_t tile = plan_.kernels->rows_per_tile;
    stats_stride_ = p_.has_statistics() ? divide_up(rows_max_, tile) * tile : 0;
    top_k_ = p_.top_keys.present() ? p_.top_keys.shape[3] : 0;
    const int64_t stats = stats_stride_ * (kRowStats * accumulator_nbytes_ + int64_t{sizeof(int64_t)}) +
                          rows_max_ * top_k_ * (accumulator_nbytes_ + int64_t{sizeof(int64_t)});
    scratch_nbytes_ = divide_up(kernel + state_nbytes_ + stats, 128) * 128;
  }

  void work(std::byte* scratch, int thread) {
    std::array<HeadTask, kMaxHeadsTogether> heads;
    int64_t batch = -1, kv_head = -1;
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= plan_.items || team_->stopped()) return;
      WorkItem item = item_at(plan_, index);
      if (item.batch != batch || item.kv_head != kv_head) {
        batch = item.batch;
        kv_head = item.kv_head;
        for (int64_t x = 0; x < item.heads; ++x) heads[static_cast<size_t>(x)] = heads_.task(batch, kv_head + x);
      }
      const SequencePlan& sequence = plan_.sequences[static_cast<size_t>(item.batch)];
      const int64_t end = item.row_end;
      for (; item.row_begin < end && !team_->stopped(); item.row_begin = item.row_end) {
        item.row_end = std::min(item.row_begin + sequence.rows_per_call, end);
        run(heads.data(), item, index, scratch);
        team_->poll(thread);
      }
    }
  }

  void run(const HeadTask* heads, const WorkItem& item, int64_t index, std::byte* scratch) {
    if (p_.weights.present()) clear_weights(item);
    RowTask task = {};
    task.head = heads;
    task.heads = item.heads;
    task.row_begin = item.row_begin;
    task.row_end = item.row_end;
    task.key_begin = item.key_begin;
    task.key_end = item.key_end;
    task.scratch = scratch;
    const int64_t rows = item.row_end - item.row_begin;
    if (item.parts == 1) {
      task.rows_between_heads = rows;
      task.row_state = scratch + kernel_nbytes_;
      task.member_stride = heads_max_ * rows_max_;
    } else {
      task.rows_between_heads = rows * item.parts;
      task.partial = partial_rows(item.partial_row);
      task.row_state = partial_state(item.partial_row);
      task.member_stride = plan_.partial_rows;
    }
    if (p_.has_statistics()) {
      std::byte* at = scratch + kernel_nbytes_ + state_nbytes_;
      const auto take = [&at](int64_t nbytes) { return std::exchange(at, at + nbytes); };
      task.row_argmax = reinterpret_cast<int64_t*>(take(stats_stride_ * int64_t{sizeof(int64_t)}));
      task.top_keys = reinterpret_cast<int64_t*>(take(rows_max_ * top_k_ * int64_t{sizeof(int64_t)}));
      task.row_stats = take(kRowStats * stats_stride_ * accumulator_nbytes_);
      task.stats_stride = stats_stride_;
      task.top_k = top_k_;
      task.top_weights = at;
      std::fill_n(task.top_keys, rows * top_k_, int64_t{-1});
      std::memset(task.top_weights, 0, static_cast<size_t>(rows * top_k_ * accumulator_nbytes_));
      if (p_.key_mass.present()) task.key_mass = mass_ + index * mass_nbytes_an_item();
    }
    const SequencePlan& sequence = plan_.sequences[static_cast<size_t>(item.batch)];
    (sequence.decode ? plan_.kernels->decode : plan_.kernels->forward)(task);

    if (item.parts > 1) {
      // acq_rel: the last to finish reads what the others wrote before they counted.
      std::atomic<int64_t>& done = pending_[static_cast<size_t>(item.group_index)];
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < item.parts) return;
      task.row_state = partial_state(item.group_partial_row);
      for (int64_t x = 0; x < item.heads; ++x) {
        const int64_t first_row = item.group_partial_row + x * task.rows_between_heads;
        RowTask merged = task;
        merged.head = heads + x;
        merged.partial = partial_rows(first_row);
        merged.row_state = partial_state(first_row);
        plan_.kernels->merge(merged, item.parts);
      }
    }
    if (p_.has_statistics()) write_statistics(task, item);
    if (!p_.lse.present()) return;
    for (int64_t x = 0; x < item.heads; ++x)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = item.row_begin + r, result = x * task.rows_between_heads + r;
        write_lse(p_.lse, item.batch, (item.kv_head + x) * plan_.group + row % plan_.group,
                  sequence.q_begin + row / plan_.group,
                  accumulator(task.row_state, kRowMax * task.member_stride + result),
                  accumulator(task.row_state, kRowSum * task.member_stride + result));
      }
  }

  void write_statistics(const RowTask& task, const WorkItem& item) {
    for (int64_t row = item.row_begin; row < item.row_end; ++row) {
      const int64_t r = row - item.row_begin, b = item.batch, h = item.kv_head * plan_.group + row % plan_.group;
      const int64_t i = plan_.sequences[static_cast<size_t>(b)].q_begin + row / plan_.group;
      for (int m = 0; m < kRowStats; ++m)
        write(stat_of(p_, m), b, h, i, accumulator(task.row_stats, m * task.stats_stride + r));
      if (p_.argmax.present()) argmax_at(p_, b, h, i) = task.row_argmax[r];
      for (int64_t x = 0; x < top_k_; ++x) {
        const TensorView &keys = p_.top_keys, &weights = p_.top_weights;
        static_cast<int64_t*>(
            keys.data)[b * keys.stride[0] + h * keys.stride[1] + i * keys.stride[2] + x * keys.stride[3]] =
            task.top_keys[r * top_k_ + x];
        store_element(weights,
                      b * weights.stride[0] + h * weights.stride[1] + i * weights.stride[2] + x * weights.stride[3],
                      accumulator(task.top_weights, r * top_k_ + x));
      }
    }
  }

  // The items of a head in their order, which is that of the plan whatever threads there are.
  void add_up_mass() const {
    const int64_t longest = p_.k.shape[2];
    std::vector<double> sums(static_cast<size_t>(plan_.group * longest));
    for (size_t b = 0; b < plan_.sequences.size(); ++b)
      for (int64_t kv_head = 0; kv_head < plan_.kv_heads; ++kv_head) {
        const SequencePlan& s = plan_.sequences[b];
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t block = 0; block < s.row_blocks; ++block) {
          const std::byte* part = mass_ + (s.first_item + kv_head * s.row_blocks + block) * mass_nbytes_an_item();
          for (int64_t x = 0; x < plan_.group * s.kv_len; ++x) sums[static_cast<size_t>(x)] += accumulator(part, x);
        }
        for (int64_t x = 0; x < plan_.group * s.kv_len; ++x)
          write(p_.key_mass, static_cast<int64_t>(b), kv_head * plan_.group + x / s.kv_len, x % s.kv_len,
                sums[static_cast<size_t>(x)]);
      }
  }

  int64_t mass_nbytes_an_item() const { return plan_.group * p_.k.shape[2] * accumulator_nbytes_; }

  void clear_weights(const WorkItem& item) {
    for (int64_t row = item.row_begin; row < item.row_end; ++row) {
      const int64_t i = row / plan_.group;
      fill_zero(p_.weights, item.batch, item.kv_head * plan_.group + row % plan_.group, i, i + 1);
    }
  }

  double accumulator(const void* p, int64_t i) const {
    return accumulator_nbytes_ == 8 ? static_cast<const double*>(p)[i]
                                    : static_cast<double>(static_cast<const float*>(p)[i]);
  }

  // Partial buffer: all sums, then the rows' states, member by member.
  std::byte* partial_rows(int64_t row) const { return partial_ + row * p_.v.shape[3] * accumulator_nbytes_; }
  std::byte* partial_state(int64_t row) const {
    return partial_ + (plan_.partial_rows * p_.v.shape[3] + row) * accumulator_nbytes_;
  }

  const CanonicalProblem& p_;
  const Plan& plan_;
  const ExecutionOptions& options_;
  const Heads heads_;
  std::unique_ptr<std::atomic<int64_t>[]> pending_;
  std::byte *partial_ = nullptr, *mass_ = nullptr;
  int64_t state_nbytes_ = 0, stats_stride_ = 0, top_k_ = 0;
  int64_t accumulator_nbytes_ = 4, rows_max_ = 0, heads_max_ = 1, kernel_nbytes_ = 0, scratch_nbytes_ = 0;
  std::atomic<int64_t> next_{0};
  std::optional<Team> team_;
};

}  // namespace

Status attention_forward(const CanonicalProblem& problem, const ExecutionOptions& options) try {
  Status status;
  const KernelTable* table = options.table != nullptr ? options.table : active_table(status);
  if (!status.ok()) return status;
  clear_reads(problem);
  // A batch without rows may be larger than any plan of it; one of packed sequences may still have rows of none.
  if (problem.q.shape[1] == 0) return {};
  if (!problem.packed() && (problem.q.shape[0] == 0 || problem.q.shape[2] == 0)) return {};
  const Plan plan = make_plan(problem, *table, options.num_threads);
  return ForwardRun(problem, plan, options)();
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "cannot allocate memory for the work plan"};
} catch (const std::length_error&) {
  return {ErrorKind::kMemory, "cannot allocate memory for the work plan"};
}

}  // namespace foveal
