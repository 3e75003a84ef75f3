// Packed sequences and caches against each sequence alone, bit by bit, for every kernel table that this machine runs:
// the promise of docs/numerics.md, and what shows sanitizers how these paths read and write memory. Scales of int8 are
// powers of two here, so codes have these bits too, but where a table multiplies them in integers.
//
// test_sequences [GROUP...] runs the groups named at the end of this file, or all.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/plan.h"
#include "attention_case.h"
#include "attention_check.h"
#include "case_lists.h"
#include "check.h"

namespace {

using namespace foveal_test;
using foveal::AttentionGradients;
using foveal::CacheUpdate;
using foveal::Status;

// Planners and runners take what `canonicalize` made, and nothing else.
static_assert(!std::is_constructible_v<foveal::CanonicalProblem, const AttentionProblem&>);
static_assert(!std::is_default_constructible_v<foveal::CanonicalProblem>);
static_assert(!std::is_invocable_v<decltype(foveal::attention_forward), const AttentionProblem&,
                                   const foveal::ExecutionOptions&>);

constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 24, kValueDim = 16;

std::mt19937_64 random_bits{7};

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(random_bits); }

Array random_array(DType dtype, const std::vector<int64_t>& shape) {
  Array array(dtype, shape);
  array.fill_with(uniform);
  return array;
}

Array integers(const std::vector<int64_t>& values, std::vector<int64_t> shape = {}) {
  if (shape.empty()) shape = {static_cast<int64_t>(values.size())};
  Array array(DType::kInt32, shape);
  for (size_t x = 0; x < values.size(); ++x)
    static_cast<int32_t*>(array.view.data)[x] = static_cast<int32_t>(values[x]);
  return array;
}

DType accumulator(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// Elements [begin, end) along an axis of memory that the view's owner keeps.
TensorView slice(TensorView view, int axis, int64_t begin, int64_t end) {
  view.data = static_cast<uint8_t*>(view.data) + begin * view.stride[axis] * foveal::itemsize(view.dtype);
  view.shape[axis] = end - begin;
  return view;
}

void expect_same_elements(const TensorView& a, const TensorView& b, const std::string& what) {
  Array left, right;
  left.view = a;
  right.view = b;
  expect_same(left, right, what);
}

// What integers add to the rounding of weights and results, by docs/numerics.md: features and codes as check_cache
// makes them, so e is below 2^-16 * 4 * 24 * log2(e) / sqrt(24).
void expect_near_elements(const TensorView& a, const TensorView& b, const std::string& what) {
  constexpr double kLargestValue = 4, kError = 4.4e-4, kRoundoff = 0x1p-8;
  Array found, expected;
  found.view = a;
  expected.view = b;
  const double bound = (0x1p-9 + std::expm1(2 * kError) + 2 * kRoundoff) * kLargestValue;
  compare(what, found, expected, [bound](double) { return bound; });
}

void expect_ok(const Status& status, const std::string& where) {
  if (!status.ok()) fail(__FILE__, __LINE__, where + ": " + status.message());
}

foveal::ExecutionOptions on(const KernelTable& table, int threads) {
  foveal::ExecutionOptions options;
  options.table = &table;
  options.num_threads = threads;
  ++cases_run;
  return options;
}

// ---- packed sequences -----------------------------------------------------------------------------------------------

struct Pass {
  AttentionProblem p;
  AttentionGradients g;

  void run(const KernelTable& table, int threads, const std::string& where) {
    p.layout = foveal::Layout::kBshd;
    Status status;
    const foveal::CanonicalGradients canonical = canonicalize(p, g, status);
    if (status.ok()) status = attention_forward(canonical.problem, on(table, threads));
    if (status.ok()) status = attention_backward(canonical, on(table, threads));
    expect_ok(status, where);
  }
};

void test_packed() {
  const std::vector<int64_t> rows = {5, 0, 1, 70, 200}, keys = {3, 4, 1, 131, 90};
  std::vector<int64_t> first_row = {0}, first_key = {0};
  for (const int64_t n : rows) first_row.push_back(first_row.back() + n);
  for (const int64_t n : keys) first_key.push_back(first_key.back() + n);
  const Array cu_seqlens_q = integers(first_row), cu_seqlens_kv = integers(first_key);
  for (const DType dtype : kDTypes)
    for (const KernelTable* table : tables())
      for (const int option : {0, 1, 2}) {
        const int64_t all_rows = first_row.back(), all_keys = first_key.back();
        Array q = random_array(dtype, {all_rows, kHeads, kHeadDim}),
              k = random_array(dtype, {all_keys, kKvHeads, kHeadDim}),
              v = random_array(dtype, {all_keys, kKvHeads, kValueDim}),
              dout = random_array(dtype, {all_rows, kHeads, kValueDim});
        Array out(dtype, {all_rows, kHeads, kValueDim}), lse(accumulator(dtype), {kHeads, all_rows});
        Array dq(dtype, {all_rows, kHeads, kHeadDim}), dk(dtype, {all_keys, kKvHeads, kHeadDim}),
            dv(dtype, {all_keys, kKvHeads, kValueDim});
        Pass packed;
        packed.p.causal = option == 1;
        packed.p.softcap = option == 1 ? 5 : 0;
        if (option == 2) packed.p.window_left = 21, packed.p.window_right = 10;
        Pass alone = packed;
        packed.p.q = q.view, packed.p.k = k.view, packed.p.v = v.view, packed.p.out = out.view, packed.p.lse = lse.view;
        packed.p.cu_seqlens_q = cu_seqlens_q.view, packed.p.cu_seqlens_kv = cu_seqlens_kv.view;
        packed.g.dout = dout.view, packed.g.dq = dq.view, packed.g.dk = dk.view, packed.g.dv = dv.view;
        const std::string where =
            std::string(table->name) + ' ' + foveal::name_of(dtype) + " option " + std::to_string(option);
        packed.run(*table, 2, where);
        for (size_t b = 0; b < rows.size(); ++b) {
          const auto own_rows = [&](const Array& x, int axis = 0) {
            return slice(x.view, axis, first_row[b], first_row[b + 1]);
          };
          const auto own_keys = [&](const Array& x) { return slice(x.view, 0, first_key[b], first_key[b + 1]); };
          Array out1(dtype, {rows[b], kHeads, kValueDim}), lse1(accumulator(dtype), {kHeads, rows[b]}),
              dq1(dtype, {rows[b], kHeads, kHeadDim}), dk1(dtype, {keys[b], kKvHeads, kHeadDim}),
              dv1(dtype, {keys[b], kKvHeads, kValueDim});
          Pass one = alone;
          one.p.q = own_rows(q), one.p.k = own_keys(k), one.p.v = own_keys(v), one.p.out = out1.view,
          one.p.lse = lse1.view;
          one.g.dout = own_rows(dout), one.g.dq = dq1.view, one.g.dk = dk1.view, one.g.dv = dv1.view;
          const std::string which = where + " sequence " + std::to_string(b) + ' ';
          one.run(*table, 1, which);
          expect_same_elements(own_rows(out), out1.view, which + "out");
          expect_same_elements(own_rows(lse, 1), lse1.view, which + "lse");
          expect_same_elements(own_rows(dq), dq1.view, which + "dq");
          expect_same_elements(own_keys(dk), dk1.view, which + "dk");
          expect_same_elements(own_keys(dv), dv1.view, which + "dv");
        }
      }
}

// ---- caches ---------------------------------------------------------------------------------------------------------

const std::vector<int64_t> kHeld = {0, 13, 250};

// A cache of pages, in random order; page_size 0: one row a sequence, without a table.
struct Cache {
  Array k, v, k_scale, v_scale, table;
  int64_t page_size, pages_each;
  std::vector<int64_t> order;

  Cache(DType dtype, int64_t page_size_or_rows, int64_t capacity, bool paged) : page_size(page_size_or_rows) {
    pages_each = (capacity + page_size - 1) / page_size;
    order.resize(kHeld.size() * static_cast<size_t>(pages_each));
    std::iota(order.begin(), order.end(), 0);
    if (paged) {
      std::shuffle(order.begin(), order.end(), random_bits);
      table = integers(order, {static_cast<int64_t>(kHeld.size()), pages_each});
    }
    const auto pages = static_cast<int64_t>(order.size());
    k = Array(dtype, {pages, page_size, kKvHeads, kHeadDim});
    v = Array(dtype, {pages, page_size, kKvHeads, kValueDim});
    if (dtype == DType::kInt8)
      for (auto [scale, codes] : {std::pair(&k_scale, &k), std::pair(&v_scale, &v)}) {
        *scale = Array(DType::kFloat32, {pages, kKvHeads});
        scale->fill_with([] { return std::ldexp(1.0, -5 - static_cast<int>(random_bits() % 3)); });
        codes->for_each([&](int64_t at) {
          static_cast<int8_t*>(codes->view.data)[at] = static_cast<int8_t>(random_bits() % 255 - 127);
        });
      }
    else
      for (Array* x : {&k, &v}) x->fill(kNaN);  // what no sequence holds yet
  }

  int64_t page(int64_t b, int64_t key) const { return order[static_cast<size_t>(b * pages_each + key / page_size)]; }
};

// Attention of `added` new tokens, which the cache gets first (int8: of the last it holds), against arrays without
// pages.
void check_cache(DType dtype, const KernelTable& table, int64_t page_size, bool int8, int64_t added) {
  const auto batch = static_cast<int64_t>(kHeld.size());
  const int64_t capacity = kHeld.back() + added + 3;
  Cache cache(int8 ? DType::kInt8 : dtype, page_size == 0 ? capacity : page_size, capacity, page_size != 0);
  Array q = random_array(dtype, {batch, added, kHeads, kHeadDim}), out(dtype, {batch, added, kHeads, kValueDim});
  Array new_k = random_array(dtype, {batch, added, kKvHeads, kHeadDim}),
        new_v = random_array(dtype, {batch, added, kKvHeads, kValueDim});
  Array cosines(DType::kFloat32, {capacity + added, kHeadDim / 2}),
      sines(DType::kFloat32, {capacity + added, kHeadDim / 2});
  cosines.fill(1);  // a rotation by nothing
  sines.fill(0);
  std::vector<Array> keys, values;  // of each sequence, new tokens included
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t held = kHeld[static_cast<size_t>(b)];
    for (auto [all, pages, scale, fresh, width] : {std::tuple(&keys, &cache.k, &cache.k_scale, &new_k, kHeadDim),
                                                   std::tuple(&values, &cache.v, &cache.v_scale, &new_v, kValueDim)}) {
      Array x(dtype, {1, int8 ? held : held + added, kKvHeads, width});
      for (int64_t j = 0; j < x.view.shape[1]; ++j)
        for (int64_t h = 0; h < kKvHeads; ++h)
          for (int64_t d = 0; d < width; ++d) {
            const int64_t page = cache.page(b, j);
            const std::vector<int64_t> at = {page, j % cache.page_size, h, d};
            if (int8) {
              x.set({0, j, h, d},
                    static_cast<const int8_t*>(pages->view.data)[pages->offset(at)] * scale->at({page, h}));
            } else if (j < held) {
              x.set({0, j, h, d}, uniform());
              pages->set(at, x.at({0, j, h, d}));
            } else {
              x.set({0, j, h, d}, fresh->at({b, j - held, h, d}));
            }
          }
      all->push_back(std::move(x));
    }
  }
  AttentionProblem p;
  CacheUpdate update;
  const Array lens = integers(kHeld);
  p.layout = foveal::Layout::kBshd;
  p.causal = true;
  AttentionProblem alone = p;
  p.q = q.view, p.k = cache.k.view, p.v = cache.v.view, p.out = out.view;
  p.kv_lens = lens.view, p.block_table = cache.table.view;
  if (int8) {
    p.k_scale = cache.k_scale.view, p.v_scale = cache.v_scale.view;
  } else {
    update.k = new_k.view, update.v = new_v.view;
    update.rotary_cos = cosines.view, update.rotary_sin = sines.view;
  }
  const std::string where = std::string(table.name) + ' ' + foveal::name_of(dtype) + (int8 ? " int8" : "") +
                            " pages of " + std::to_string(page_size) + ", " + std::to_string(added) + " new";
  Status status;
  const foveal::CanonicalUpdate canonical = canonicalize(p, update, status);
  if (status.ok()) status = attention_kvcache(canonical, on(table, 2));
  expect_ok(status, where);
  for (int64_t b = 0; b < batch; ++b) {
    Array one(dtype, {1, added, kHeads, kValueDim});
    AttentionProblem own = alone;
    own.q = slice(q.view, 0, b, b + 1), own.k = keys[static_cast<size_t>(b)].view,
    own.v = values[static_cast<size_t>(b)].view;
    own.out = one.view;
    const foveal::CanonicalProblem canonical_own = canonicalize(own, status);
    if (status.ok()) status = attention_forward(canonical_own, on(table, 1));
    expect_ok(status, where + " alone");
    const foveal::RowKernels& kernels = foveal::kernels_for(table, dtype);
    const int64_t rows = added * kHeads / kKvHeads;
    const bool integers =
        int8 && kernels.rounding_rows > 0 && rows >= kernels.rounding_rows && rows <= kernels.decode_rows;
    (integers ? expect_near_elements : expect_same_elements)(slice(out.view, 0, b, b + 1), one.view,
                                                             where + " sequence " + std::to_string(b));
  }
}

void test_caches() {
  for (const DType dtype : kDTypes)
    for (const KernelTable* table : tables())
      for (const int64_t page_size : {0, 1, 7, 16, 128})
        for (const int64_t added : {1, 3, 40})
          for (const bool int8 : {false, true})
            if (!int8 || (page_size != 0 && dtype != DType::kFloat64))
              check_cache(dtype, *table, page_size, int8, added);
}

}  // namespace

int main(int argc, char** argv) { return run_groups(argc, argv, {{"packed", test_packed}, {"caches", test_caches}}); }
