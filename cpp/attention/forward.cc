// Runs a forward plan: prepares the heads, spreads the work items over threads, merges split key ranges.
//
// Threads take items from one counter; an item's result does not depend on who computes it. The parts of a split row
// block are merged in order by whoever finishes the last of them.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

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

// Rows that no sequence has, of every head.
void finish_padding(const CanonicalProblem& p) {
  for_each_padding(p, [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t h = 0; h < p.q.shape[1]; ++h) {
      fill_zero(p.out, b, h, begin, end);
      fill_zero(p.weights, b, h, begin, end);
      if (p.lse.present())
        for (int64_t i = begin; i < end; ++i) write_lse(p.lse, b, h, i, 0, 0);
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
    const Scratch partial = allocate_scratch(partial_nbytes);
    if (scratch == nullptr || partial == nullptr)
      return {ErrorKind::kMemory, "cannot allocate " + std::to_string(scratch_nbytes_ * team.size() + partial_nbytes) +
                                      " bytes of scratch memory"};
    partial_ = partial.get();
    if (plan_.groups > 0) pending_ = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(plan_.groups));

    return team.run([&](int thread) { work(scratch.get() + scratch_nbytes_ * thread, thread); });
  }

 private:
  void measure_scratch() {
    HeadTask h = heads_.task(0, 0);
    int64_t kernel = 0;
    rows_max_ = 0;
    for (const SequencePlan& s : plan_.sequences) {
      h.kv_len = s.kv_len;
      const int64_t rows = std::min(s.rows_per_block, s.rows);
      rows_max_ = std::max(rows_max_, rows);
      heads_max_ = std::max(heads_max_, s.heads_together);
      kernel = std::max(kernel, s.decode ? plan_.kernels->decode_scratch_nbytes(h, s.heads_together)
                                         : plan_.kernels->forward_scratch_nbytes(h, rows));
    }
    // The kernel's own, then the state of the rows; a whole number of cache lines a thread.
    kernel_nbytes_ = kernel;
    const int64_t total = kernel + kRowMembers * heads_max_ * rows_max_ * accumulator_nbytes_;
    scratch_nbytes_ = (total + 127) / 128 * 128;
  }

  void work(std::byte* scratch, int thread) {
    std::array<HeadTask, kMaxHeadsTogether> heads;
    int64_t batch = -1, kv_head = -1;
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= plan_.items || team_->stopped()) return;
      const WorkItem item = item_at(plan_, index);
      if (item.batch != batch || item.kv_head != kv_head) {
        batch = item.batch;
        kv_head = item.kv_head;
        for (int64_t x = 0; x < item.heads; ++x) heads[static_cast<size_t>(x)] = heads_.task(batch, kv_head + x);
      }
      run(heads.data(), item, scratch);
      team_->poll(thread);
    }
  }

  void run(const HeadTask* heads, const WorkItem& item, std::byte* scratch) {
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
  std::byte* partial_ = nullptr;
  int64_t accumulator_nbytes_ = 4, rows_max_ = 0, heads_max_ = 1, kernel_nbytes_ = 0, scratch_nbytes_ = 0;
  std::atomic<int64_t> next_{0};
  std::optional<Team> team_;
};

}  // namespace

Status attention_forward(const CanonicalProblem& problem, const ExecutionOptions& options) try {
  Status status;
  const KernelTable* table = options.table != nullptr ? options.table : active_table(status);
  if (!status.ok()) return status;
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
