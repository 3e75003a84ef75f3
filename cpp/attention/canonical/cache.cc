// Judges what attention to a cache of keys and values takes beside the arguments of attention, and makes a problem in
// pages of it: a cache of one row a sequence is read as pages of one row's length, so both are one case from here on.
#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/canonical/cache.h"
#include "attention/canonical/view.h"
#include "attention/element.h"
#include "attention/overlap.h"
#include "attention/rejection.h"
#include "foveal/attention.h"

namespace foveal {
namespace {

void require_rank(const char* name, const TensorView& view, int rank) {
  if (view.rank != rank) {
    reject_value(std::string(name) + " has " + dimensions(view.rank) + ", expected " + std::to_string(rank));
  }
}

void require_integer(const char* name, const TensorView& view) {
  if (view.dtype != DType::kInt32 && view.dtype != DType::kInt64) reject_dtype(name, view.dtype, "int32 or int64");
}

void require_here(const char* name, const TensorView& view) {
  if (view.present() && view.device.type != DeviceType::kCpu) {
    reject_type(std::string(name) + " is on " + text_of(view.device) + ", expected cpu");
  }
}

std::string indexed(const char* name, int64_t i, int64_t value) {
  return std::string(name) + "[" + std::to_string(i) + "]" + is_integer(value);
}

// Of integers that the problem owns.
TensorView own_view(int64_t* data, const CanonicalProblem& p, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = DType::kInt64;
  view.device = p.q.device;
  view.rank = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  std::fill_n(view.stride, view.rank, 1);
  return view;
}

// One page a sequence: its row of the cache.
void make_table(CanonicalUpdate& u) {
  CanonicalProblem& p = u.problem;
  const int64_t batch = p.q.shape[0], rows = p.k.shape[0];
  p.own_block_table.reset(new int64_t[static_cast<size_t>(batch)]);
  if (u.cache_batch_idx.present()) {
    require_here("cache_batch_idx", u.cache_batch_idx);
    require_integer("cache_batch_idx", u.cache_batch_idx);
    if (u.cache_batch_idx.rank != 1 || u.cache_batch_idx.shape[0] != batch)
      reject_shape("cache_batch_idx", u.cache_batch_idx, "(B,) = " + text_of(p.q.shape, 1));
  } else if (rows != batch) {
    reject_value(extent_found("k_cache", 0, rows) + ", expected batch " + std::to_string(batch) + " (from q)");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t row = u.cache_batch_idx.present() ? load_integer(u.cache_batch_idx, b) : b;
    if (row < 0 || row >= rows) {
      reject_value(indexed("cache_batch_idx", b, row) + ", expected 0 to " + std::to_string(rows - 1) +
                   " (k_cache.shape[0] is " + std::to_string(rows) + ")");
    }
    p.own_block_table[static_cast<size_t>(b)] = row;
  }
  p.block_table = own_view(p.own_block_table.get(), p, {batch, 1});
}

// problem.kv_lens becomes what the sequences hold after the new tokens.
void add_new_lengths(CanonicalUpdate& u, int64_t capacity) {
  CanonicalProblem& p = u.problem;
  const int64_t batch = p.q.shape[0], added = u.k.present() ? u.k.shape[1] : 0;
  const TensorView& lens = p.kv_lens;
  if (!lens.present()) reject_type("cache_lens is None, expected (B,) integers");
  require_here("cache_lens", lens);
  require_integer("cache_lens", lens);
  if (lens.rank != 0 && (lens.rank != 1 || lens.shape[0] != batch)) {
    reject_shape("cache_lens", lens, "an integer or (B,) = " + text_of(p.q.shape, 1));
  }
  p.own_kv_lens.reset(new int64_t[static_cast<size_t>(batch)]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t held = integer_at(lens, lens.rank == 0 ? 0 : b * lens.stride[0]);
    if (held < 0 || held > capacity - added) {
      const std::string room = "room for " + std::to_string(capacity) + " tokens, " + std::to_string(added) + " new";
      reject_value(indexed("cache_lens", b, held) + ", expected 0 to " + std::to_string(capacity - added) + " (" +
                   room + ")");
    }
    p.own_kv_lens[static_cast<size_t>(b)] = held + added;
  }
  p.kv_lens = own_view(p.own_kv_lens.get(), p, {batch});
}

// The problem is canonical.
void check_new_tokens(CanonicalUpdate& u) {
  const CanonicalProblem& p = u.problem;
  const int64_t added = u.k.shape[1];
  for (const auto& [name, view, cache] : {std::tuple("k", &u.k, &p.k), std::tuple("v", &u.v, &p.v)}) {
    require_here(name, *view);
    if (view->dtype != p.q.dtype) reject_dtype(name, view->dtype, name_of(p.q.dtype) + std::string(" (from q)"));
    const int64_t expected[] = {p.q.shape[0], added, cache->shape[1], cache->shape[3]};
    if (!std::equal(expected, expected + 4, view->shape)) {
      reject_shape(name, *view, text_of(expected, 4) + " (from q, k and " + name + "_cache)");
    }
    *view = canonical_view(*view, Layout::kBshd);
  }
  for (const auto& [name, cache] : {std::pair("k_cache", &p.k), std::pair("v_cache", &p.v)})
    if (may_overlap_itself(*cache)) reject_value(std::string(name) + " has elements that share memory");
  if (may_overlap(p.k, p.v)) reject_value("v_cache shares memory with k_cache, expected a separate array");
  using Named = std::pair<const char*, const TensorView*>;
  for (const auto& [name, view] : {Named("q", &p.q), Named("k", &u.k), Named("v", &u.v)})
    for (const TensorView* cache : {&p.k, &p.v})
      if (may_overlap(*cache, *view))
        reject_value(std::string(name) + " shares memory with the cache, expected a separate array");
}

// A page that gets new tokens has one writer. The problem is canonical, so the pages that are used exist.
void check_writers(const CanonicalUpdate& u) {
  const CanonicalProblem& p = u.problem;
  struct Writer {
    int64_t page, b, column;
  };
  const TensorView& table = p.block_table;
  const int64_t added = u.k.shape[2], page_size = p.k.shape[2];
  if (added == 0) return;
  std::vector<Writer> writers;
  for (int64_t b = 0; b < p.q.shape[0]; ++b) {
    const int64_t len = load_integer(p.kv_lens, b);
    for (int64_t column = (len - added) / page_size; column <= (len - 1) / page_size; ++column)
      writers.push_back({integer_at(table, b * table.stride[0] + column * table.stride[1]), b, column});
  }
  std::sort(writers.begin(), writers.end(), [](const Writer& x, const Writer& y) {
    return std::tie(x.page, x.b, x.column) < std::tie(y.page, y.b, y.column);
  });
  const auto twice = std::adjacent_find(writers.begin(), writers.end(),
                                        [](const Writer& x, const Writer& y) { return x.page == y.page; });
  if (twice == writers.end()) return;
  const bool rows = u.cache_batch_idx.present();
  const auto named = [rows](const Writer& x) {
    return rows ? "cache_batch_idx[" + std::to_string(x.b) + "]"
                : "block_table[" + std::to_string(x.b) + ", " + std::to_string(x.column) + "]";
  };
  reject_value(named(twice[1]) + is_integer(twice[1].page) + " like " + named(twice[0]) + ", expected a " +
               (rows ? "row" : "page") + " of its own for new tokens");
}

void check_rotary(const CanonicalUpdate& u) {
  const CanonicalProblem& p = u.problem;
  if (!u.rotary_cos.present() && !u.rotary_sin.present()) return;
  for (const auto& [name, table] : {std::pair("rotary_cos", &u.rotary_cos), std::pair("rotary_sin", &u.rotary_sin)}) {
    if (!table->present()) reject_value(std::string(name) + " is absent, expected rotary_cos and rotary_sin");
    require_here(name, *table);
    if (!is_floating(table->dtype)) reject_dtype(name, table->dtype, "float32, float64, float16 or bfloat16");
    require_rank(name, *table, 2);
  }
  if (!u.k.present()) reject_value("rotary_cos is given without k and v, expected new tokens");
  const int64_t* shape = u.rotary_cos.shape;
  if (!std::equal(shape, shape + 2, u.rotary_sin.shape))
    reject_shape("rotary_sin", u.rotary_sin, text_of(shape, 2) + " (from rotary_cos)");
  if (shape[1] > p.q.shape[3] / 2) {
    reject_value(extent_found("rotary_cos", 1, shape[1]) + ", expected at most " + std::to_string(p.q.shape[3] / 2) +
                 " (half of q's head_dim)");
  }
  int64_t longest = 0;
  for (int64_t b = 0; b < p.q.shape[0]; ++b) longest = std::max(longest, load_integer(p.kv_lens, b));
  const int64_t last = longest + std::max<int64_t>(p.q.shape[2] - u.k.shape[2], 0);
  if (shape[0] < last) {
    reject_value(extent_found("rotary_cos", 0, shape[0]) + ", expected at least " + std::to_string(last) +
                 " positions (from cache_lens)");
  }
}

// problem.q becomes memory of its own.
void make_room_for_turned_queries(CanonicalUpdate& u) {
  TensorView& q = u.problem.q;
  const int64_t heads = q.shape[1], rows = q.shape[2], width = q.shape[3];
  u.queries = q;
  u.problem.own_q.reset(new std::byte[static_cast<size_t>(q.shape[0] * heads * rows * width * itemsize(q.dtype))]);
  q.data = u.problem.own_q.get();
  q.stride[3] = 1;
  q.stride[1] = width;
  q.stride[2] = heads * width;
  q.stride[0] = rows * heads * width;
}

}  // namespace

void check_cache(CanonicalUpdate& u) {
  CanonicalProblem& p = u.problem;
  require_rank("q", p.q, 4);
  require_rank("k_cache", p.k, 4);
  require_rank("v_cache", p.v, 4);
  require_here("q", p.q);
  if (u.k.present() != u.v.present()) {
    reject_value(std::string(u.k.present() ? "v" : "k") + " is absent, expected k and v");
  }
  if (u.k.present()) {
    require_rank("k", u.k, 4);
    require_rank("v", u.v, 4);
  }
  if (!p.block_table.present()) {
    make_table(u);
  } else {
    if (u.cache_batch_idx.present()) reject_value("cache_batch_idx is given with block_table, expected one of them");
    require_here("block_table", p.block_table);
    require_rank("block_table", p.block_table, 2);
  }
  int64_t capacity = 0;
  if (__builtin_mul_overflow(p.block_table.shape[1], p.k.shape[1], &capacity))
    capacity = std::numeric_limits<int64_t>::max() / 2;
  add_new_lengths(u, capacity);
}

void check_update(CanonicalUpdate& u) {
  if (u.k.present()) {
    check_new_tokens(u);
    check_writers(u);
  }
  check_rotary(u);
  if (u.rotary_cos.present()) make_room_for_turned_queries(u);
}

}  // namespace foveal
