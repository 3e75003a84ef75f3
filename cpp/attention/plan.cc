#include "attention/plan.h"

#include <algorithm>

#include "attention/divide_up.h"

namespace foveal {
namespace {

// Long key ranges of few rows are cut, so that one sequence can use every core; each part costs one write and read of
// its sums.
constexpr int64_t kDecodePartKeys = 1024;
constexpr int64_t kForwardPartKeys = 2048;

// Into how many items a head's rows are cut, at most, where each keeps sums of its own for every key.
constexpr int64_t kMassParts = 8;

// With a threshold every row may keep a list of all its keys.
constexpr int64_t kRowsKeepingKeys = 96;
constexpr int64_t kItemsEnough = 32;  // where fewer would be left, fewer rows share a key block

// Heads go together in a few-rows item as long as the keys and values of their block fit in the second-level cache, and
// there are kItemsAThread.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kBlockKeys = 128;

// How many heads a few-rows item may take: more than one where that reads memory in its order.
int64_t most_heads_together(const CanonicalProblem& p) {
  const auto side_by_side = [](const TensorView& x) { return x.stride[3] == 1 && x.stride[1] == x.shape[3]; };
  if (!side_by_side(p.k) || !side_by_side(p.v)) return 1;
  const int64_t head_nbytes = kBlockKeys * (p.k.shape[3] + p.v.shape[3]) * itemsize(p.k.dtype);
  return std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(head_nbytes, 1), 1,
                             std::min(kMaxHeadsTogether, std::max<int64_t>(p.k.shape[1], 1)));
}

}  // namespace

const RowKernels& kernels_for(const KernelTable& table, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return table.float64;
    case DType::kFloat16:
      return table.float16;
    case DType::kBFloat16:
      return table.bfloat16;
    default:
      return table.float32;
  }
}

Plan make_plan(const CanonicalProblem& p, const KernelTable& table, int threads) {
  Plan plan;
  plan.kernels = &kernels_for(table, p.q.dtype);
  plan.kv_heads = p.k.shape[1];
  plan.group = plan.kv_heads > 0 ? p.q.shape[1] / plan.kv_heads : 1;
  const int64_t batch = plan.kv_heads > 0 ? p.q.shape[0] : 0;
  // How many rows go together is nothing to a row's own arithmetic (tile_forward.inl.h), so this alone may look at the
  // batch.
  const int64_t tile = plan.kernels->rows_per_tile;
  const int64_t most_rows = p.q.shape[2] * plan.group;
  const bool lists = has_threshold(p.normalizer);
  const int64_t most_rows_per_item = divide_up(lists ? kRowsKeepingKeys : kRowsSharingKeys, tile) * tile;
  int64_t rows_per_item = most_rows_per_item;
  while (rows_per_item > tile && batch * plan.kv_heads * divide_up(most_rows, rows_per_item) < kItemsEnough)
    rows_per_item = std::max(divide_up(rows_per_item / 2, tile) * tile, tile);
  plan.sequences.reserve(static_cast<size_t>(batch));
  int64_t decode_parts = 0;
  for (int64_t b = 0; b < batch; ++b) {
    SequencePlan s;
    static_cast<Sequence&>(s) = sequence_at(p, b);
    s.rows = s.q_len * plan.group;
    const bool plain = !p.reads_weights() && !p.has_statistics();
    s.decode = s.rows <= plan.kernels->decode_rows && plain && !p.additive.present() && p.dropout_p == 0.0 && !lists;
    s.rows_per_block = s.decode ? std::max<int64_t>(s.rows, 1) : rows_per_item;
    s.rows_per_call = s.rows_per_block;
    // What keys get of all rows is summed by items that are the same for any number of threads.
    if (p.key_mass.present())
      s.rows_per_block =
          std::max(divide_up(divide_up(s.rows, kMassParts), most_rows_per_item), int64_t{1}) * most_rows_per_item;
    s.row_blocks = divide_up(s.rows, s.rows_per_block);
    // Where keys are cut does enter the arithmetic: by this sequence's own rows and keys only.
    s.keys_per_part = s.decode ? kDecodePartKeys : kForwardPartKeys;
    s.parts = divide_up(s.kv_len, s.keys_per_part);
    if (s.rows > tile || s.parts < 2 || !plain || lists) {
      s.parts = 1;
      s.keys_per_part = s.kv_len;
    }
    if (s.decode) decode_parts += s.parts;
    plan.flops += 2.0 * static_cast<double>(plan.kv_heads * s.rows) * static_cast<double>(s.kv_len) *
                  static_cast<double>(p.k.shape[3] + p.v.shape[3]);
    plan.sequences.push_back(s);
  }
  // A head's arithmetic is its own, so this too may look at the batch, and at the threads.
  int64_t heads_together = most_heads_together(p);
  while (heads_together > 1 && decode_parts * divide_up(plan.kv_heads, heads_together) < kItemsAThread * threads)
    heads_together = divide_up(heads_together, 2);
  for (SequencePlan& s : plan.sequences) {
    s.heads_together = s.decode ? heads_together : 1;
    const int64_t groups = divide_up(plan.kv_heads, s.heads_together) * s.row_blocks;
    s.first_item = plan.items;
    s.first_group = plan.groups;
    s.first_partial_row = plan.partial_rows;
    plan.items += groups * s.parts;
    if (s.parts > 1) {
      plan.groups += groups;
      plan.partial_rows += plan.kv_heads * s.rows * s.parts;
    }
  }
  return plan;
}

WorkItem item_at(const Plan& plan, int64_t index) {
  const auto after = std::upper_bound(plan.sequences.begin(), plan.sequences.end(), index,
                                      [](int64_t x, const SequencePlan& s) { return x < s.first_item; });
  const SequencePlan& s = *(after - 1);
  const int64_t local = index - s.first_item;
  const int64_t groups = divide_up(plan.kv_heads, s.heads_together) * s.row_blocks;
  const int64_t group = local % groups;
  WorkItem item;
  item.batch = (after - 1) - plan.sequences.begin();
  item.kv_head = group / s.row_blocks * s.heads_together;
  item.heads = std::min(s.heads_together, plan.kv_heads - item.kv_head);
  // Under a causal mask the last rows see the most keys: hand them out first, so that threads finish together.
  const int64_t block = s.row_blocks - 1 - group % s.row_blocks;
  item.row_begin = block * s.rows_per_block;
  item.row_end = std::min(item.row_begin + s.rows_per_block, s.rows);
  item.part = local / groups;
  item.parts = s.parts;
  item.key_begin = item.part * s.keys_per_part;
  item.key_end = std::min(item.key_begin + s.keys_per_part, s.kv_len);
  item.group_index = s.first_group + group;
  item.group_partial_row = s.first_partial_row + item.kv_head * s.rows * s.parts;
  item.partial_row = item.group_partial_row + item.part * s.rows;
  return item;
}

}  // namespace foveal
