// The HOW: which kernel, row blocks and key parts a problem is cut into.
//
// Everything that enters the arithmetic is decided per batch element, from its own q_len and kv_len, D, Dv, dtype,
// options and the GQA ratio; never from the batch size, the number of heads or of threads. So a sequence gives the same
// bits alone, padded, or in any batch.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/heads.h"
#include "foveal/attention.h"
#include "kernels/kernel_table.h"

namespace foveal {

// A key block, packed or not, is read once for so many rows, forward and backward: packing becomes a few percent of the
// work, and K and V stay in the second-level cache.
constexpr int64_t kRowsSharingKeys = 192;

constexpr int64_t kItemsAThread = 4;  // enough for threads to finish together

// How one batch element is cut. Its items are numbered key part by key part, in each head by head (or so many heads
// that go together), in each row block by row block: the order of memory where heads lie side by side.
struct SequencePlan : Sequence {
  bool decode;             // the few-rows kernel
  int64_t heads_together;  // an item's; 1 if not decode
  int64_t rows;            // q_len * group
  int64_t rows_per_block;
  int64_t rows_per_call;  // of an item's rows, so many go to the kernel at once
  int64_t row_blocks;
  int64_t keys_per_part;
  int64_t parts;        // more than 1: partial results, merged in order
  int64_t first_item;   // of this element
  int64_t first_group;  // a group is the parts of the same rows; numbered only where parts > 1
  int64_t first_partial_row;
};

struct Plan {
  const RowKernels* kernels = nullptr;
  int64_t group = 1, kv_heads = 0;
  std::vector<SequencePlan> sequences;
  int64_t items = 0;
  int64_t groups = 0;
  int64_t partial_rows = 0;
  double flops = 0;  // an upper estimate, to decide whether threads are worth waking
};

struct WorkItem {
  int64_t batch;
  int64_t kv_head, heads;  // the first, and how many
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  int64_t part, parts;
  int64_t group_index;        // where parts > 1
  int64_t partial_row;        // first row of this part in the partial buffer, of the first head
  int64_t group_partial_row;  // first row of part 0
};

const RowKernels& kernels_for(const KernelTable& table, DType dtype);

// `threads` may work on it.
Plan make_plan(const CanonicalProblem& problem, const KernelTable& table, int threads);

WorkItem item_at(const Plan& plan, int64_t index);

}  // namespace foveal
