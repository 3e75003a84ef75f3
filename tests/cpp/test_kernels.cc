// Every kernel table that this machine runs, against the float64 oracle and against itself.
//
// Values: within ErrorBound of the oracle, NaN and infinity exactly where the oracle has them, for each dtype, shapes
// around the kernels' own boundaries, every option alone and in random mixtures, and every memory layout. Bits: the
// same for any number of threads, in any batch, padded or not, and whatever the other rows hold.
//
// test_kernels [GROUP...] runs the groups named at the end of this file, or all.
#include <set>

#include "attention/plan.h"
#include "attention_case.h"
#include "attention_check.h"
#include "case_lists.h"
#include "check.h"

namespace {

using namespace foveal_test;
using foveal::KernelTable;
using foveal::Status;

// Where the kernels change course: the key block (softmax.inl.h) and the splits of long key ranges (plan.cc).
constexpr int64_t kKeyBlock = 128, kDecodePart = 1024, kForwardPart = 2048;

Answer oracle(const Problem& problem) {
  Status status;
  foveal::CanonicalProblem p = problem.canonical(status);
  Answer answer;
  if (!status.ok()) foveal_test::fail(__FILE__, __LINE__, text_of(problem.asked) + ": " + status.message());
  const Case& c = problem.asked;
  answer.out = Array(DType::kFloat64, {c.batch, c.heads, c.seqlen_q, c.value_dim});
  answer.lse = Array(DType::kFloat64, {c.batch, c.heads, c.seqlen_q});
  p.out = answer.out.view;
  p.lse = answer.lse.view;
  if (c.weights) {
    answer.weights = Array(DType::kFloat64, {c.batch, c.heads, c.seqlen_q, c.seqlen_kv});
    p.weights = answer.weights.view;
  }
  if (c.stats) {
    for (Array* array : {&answer.entropy, &answer.mass, &answer.max_weight, &answer.threshold})
      *array = Array(DType::kFloat64, {c.batch, c.heads, c.seqlen_q});
    answer.argmax = Array(DType::kInt64, {c.batch, c.heads, c.seqlen_q});
    p.entropy = answer.entropy.view;
    p.mass = answer.mass.view;
    p.max_weight = answer.max_weight.view;
    p.threshold = answer.threshold.view;
    p.argmax = answer.argmax.view;
  }
  FOVEAL_CHECK(attention_reference(p).ok());
  return answer;
}

void compute(Problem& problem, const KernelTable& table, int threads = 1) {
  for (Array* array : {&problem.out, &problem.lse, &problem.weights, &problem.entropy, &problem.mass,
                       &problem.max_weight, &problem.threshold, &problem.argmax})
    if (array->view.present()) array->poison();
  Status status;
  const foveal::CanonicalProblem p = problem.canonical(status);
  foveal::ExecutionOptions options;
  options.table = &table;
  options.num_threads = threads;
  if (status.ok()) status = attention_forward(p, options);
  if (!status.ok()) foveal_test::fail(__FILE__, __LINE__, text_of(problem.asked) + ": " + status.message());
  ++cases_run;
}

// Whether some batch element of the problem goes to a kernel that rounds its weights.
bool rounds_weights(const Problem& problem, const KernelTable& table) {
  const Case& c = problem.asked;
  const foveal::RowKernels& k = kernels_for(table, c.dtype);
  if (k.rounding_rows == 0 || problem.weights.view.present() || c.kv_heads == 0) return false;
  const int64_t group = c.heads / c.kv_heads;
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t rows = (c.q_lens.empty() ? c.seqlen_q : c.q_lens[static_cast<size_t>(b)]) * group;
    if (rows >= k.rounding_rows && rows <= k.decode_rows) return true;
  }
  return false;
}

void compare_with_oracle(Problem& problem, const Answer& answer, const KernelTable& table) {
  const ErrorBound bound(problem, rounds_weights(problem, table));
  compute(problem, table);
  const std::string where = std::string(table.name) + ' ' + text_of(problem.asked);
  compare(where + ": out", problem.out, answer.out, [&](double x) { return bound.out(x); });
  if (problem.lse.view.present())
    compare(where + ": lse", problem.lse, answer.lse, [&](double x) { return bound.lse(x); });
  if (problem.weights.view.present())
    compare(where + ": weights", problem.weights, answer.weights, [&](double x) { return bound.weights(x); });
  if (problem.asked.stats) {
    const auto keys = static_cast<double>(problem.asked.seqlen_kv);
    compare(where + ": entropy", problem.entropy, answer.entropy, [&](double) { return bound.entropy(keys); });
    compare(where + ": mass", problem.mass, answer.mass, [&](double x) { return bound.mass(x); });
    compare(where + ": max_weight", problem.max_weight, answer.max_weight,
            [&](double x) { return bound.weights(x) + bound.unit() * x; });
    compare(where + ": threshold", problem.threshold, answer.threshold, [&](double x) { return bound.lse(x); });
    if (problem.asked.dtype == DType::kFloat64) expect_same(problem.argmax, answer.argmax, where + ": argmax");
  }
  for (const Array* array : {&problem.out, &problem.lse, &problem.weights})
    if (array->view.present() && !array->gaps_untouched())
      foveal_test::fail(__FILE__, __LINE__, where + ": memory between the elements of an output was written");
}

void check(Problem& problem) {
  const Answer answer = oracle(problem);
  for (const KernelTable* table : tables()) compare_with_oracle(problem, answer, *table);
}

void check(const Case& c) {
  Problem problem(c);
  check(problem);
}

// ---- values ---------------------------------------------------------------------------------------------------------

// Row counts where some table changes its kernel or its tile.
std::set<int64_t> row_counts(DType dtype) {
  std::set<int64_t> counts = around({0, 1});
  for (const KernelTable* table : tables()) {
    const foveal::RowKernels& k = kernels_for(*table, dtype);
    counts.merge(around({k.decode_rows, k.rows_per_tile / 3, 2 * k.rows_per_tile / 3, k.rows_per_tile}));
  }
  return counts;
}

void test_lengths() {
  for (const DType dtype : kDTypes) {
    Case c;
    c.dtype = dtype;
    c.head_dim = 9;
    c.value_dim = 5;
    for (const int64_t rows : row_counts(dtype))
      for (const int64_t keys : around({0, 1, 4, 8, 16, kKeyBlock})) {
        c.seqlen_q = rows;
        c.seqlen_kv = keys;
        c.causal = (rows + keys) % 2 == 0;
        ++c.seed;
        check(c);
      }
    // Rows over several tiles and several work items.
    for (const int64_t rows : {191, 193, 400}) {
      c.seqlen_q = rows;
      c.seqlen_kv = 2 * kKeyBlock + 3;
      for (const bool causal : {false, true}) {
        c.causal = causal;
        check(c);
      }
    }
  }
}

void test_head_dims() {
  for (const DType dtype : kDTypes)
    for (const int64_t head_dim : around({1, 4, 8, 16, 32, 64, 128}))
      for (const int64_t rows : {1, 3, 20}) {
        Case c;
        c.dtype = dtype;
        c.head_dim = std::max<int64_t>(head_dim, 1);
        c.value_dim = 130 - head_dim;
        c.seqlen_q = rows;
        c.seqlen_kv = 41;
        c.seed = static_cast<uint64_t>(head_dim);
        check(c);
        std::swap(c.head_dim, c.value_dim);
        check(c);
      }
}

// Long key ranges are cut and merged.
void test_parts() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 2, 7, 9, 50})
      for (const int64_t keys : around({kDecodePart, kForwardPart, 2 * kForwardPart})) {
        if (keys % 2 == 0 && dtype != DType::kFloat32 && rows > 9) continue;  // the oracle is slow
        Case c;
        c.dtype = dtype;
        c.seqlen_q = rows;
        c.seqlen_kv = keys;
        c.head_dim = 4;
        c.value_dim = 3;
        c.sinks = rows == 2;
        c.causal = rows == 7;
        if (rows == 9) c.window_left = 1500;
        if (rows == 1 && keys % 2 != 0) c.mask = 8, c.mask_density = 0.01;
        check(c);
      }
}

Case with_options(DType dtype, int64_t rows) { return grouped(dtype, rows, 150, 16, 12); }

// Each option by itself, for the few-rows and the many-rows kernel.
void test_options() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 2, 37}) {
      Variations list = each_option(with_options(dtype, rows), kKeyBlock);
      for (const double dropout_p : {0.1, 0.9, 1.0})
        list.add([&](Case& c) { c.dropout_p = dropout_p, c.weights = true; });
      for (Case c : std::vector<Case>(list.cases)) {
        c.stats = true;
        if (c.seed % 3 == 0) check(c);
      }
      list.add([](Case& c) { c.lse = false; });
      list.add([](Case& c) { c.weights = true; });
      for (const std::vector<int64_t>& lens : std::vector<std::vector<int64_t>>{{0, 150}, {149, 1}, {128, 129}})
        list.add([&](Case& c) { c.kv_lens = lens, c.causal = true, c.weights = true; });
      list.add([&](Case& c) {
        c.q_lens = {rows, rows / 2}, c.kv_lens = {5, 140}, c.causal = true, c.weights = true, c.sinks = true;
      });
      for (const Case& c : list.cases) check(c);
    }
}

void test_additive() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64})
    for (const int64_t rows : {1, 2, 37})
      for (Case c : each_additive(with_options(dtype, rows)).cases) {
        c.stats = c.seed % 2 == 0;
        c.weights = c.seed % 3 == 0;
        check(c);
      }
}

// Every option under every other normaliser; rows of few and of many weights, of one key and of several key blocks.
void test_normalizers() {
  for (const Normalizer normalizer : kOtherNormalizers)
    for (const DType dtype : kDTypes) {
      for (const int64_t rows : {1, 2, 37}) {
        Case base = with_options(dtype, rows);
        base.normalizer = normalizer;
        Variations list = each_option(base, kKeyBlock);
        for (const double scale : {0.0, 0.01, 10.0})
          list.add([&](Case& c) { c.scale = scale, c.weights = true, c.causal = rows == 37; });
        for (const double dropout_p : {0.1, 1.0})
          list.add([&](Case& c) { c.dropout_p = dropout_p, c.weights = true, c.bias = 15, c.bias_hides = true; });
        for (Case c : list.cases) {
          c.stats = c.seed % 2 == 0;
          if (rows != 2 || c.seed % 3 == 0) check(c);
        }
      }
      Case c;
      c.dtype = dtype;
      c.normalizer = normalizer;
      c.head_dim = 9;
      c.value_dim = 5;
      c.scale = 2;
      for (const int64_t rows : row_counts(dtype))
        for (const int64_t keys : {int64_t{1}, int64_t{2}, kKeyBlock + 1, kDecodePart + 30, kForwardPart + 30}) {
          c.seqlen_q = rows;
          c.seqlen_kv = keys;
          c.causal = (rows + keys) % 2 == 0;
          ++c.seed;
          if (keys < kDecodePart || rows < 10) check(c);
        }
    }
}

// Layouts: every one for every array, inputs and output mixed.
void test_storage() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 5, 23}) {
      Case c = with_options(dtype, rows);
      c.causal = true;
      size_t x = 0;
      for (const Storage input : kInputStorages)
        for (Storage Case::* array : {&Case::q_storage, &Case::k_storage, &Case::v_storage}) {
          Case one = c;
          one.*array = input;
          one.out_storage = kOutputStorages[x++ % std::size(kOutputStorages)];
          one.weights = rows == 23;
          check(one);
        }
    }
}

void test_mixtures() {
  RandomCases cases(110, 300);
  for (int x = 0; x < 400; ++x) {
    Case c = cases.next();
    c.weights = cases.chance(4);
    check(c);
  }
}

// Scores far apart, so that the maximum moves and old sums are rescaled, to nothing in places.
void test_moving_maximum() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 4, 40})
      for (const double last : {0.0, 30.0, 300.0}) {
        Case c = with_options(dtype, rows);
        c.seqlen_kv = 700;
        c.bias = 8;
        Problem problem(c);
        for (int64_t j = 0; j < c.seqlen_kv; ++j) problem.bias.set({0, 0, 0, j}, last * static_cast<double>(j) / 700);
        check(problem);
        for (int64_t j = 0; j < c.seqlen_kv; ++j) problem.bias.set({0, 0, 0, j}, -last * static_cast<double>(j) / 700);
        check(problem);
      }
}

// ---- what must not be read ------------------------------------------------------------------------------------------

// NaN and infinity at keys that some rows must not see: those rows stay clean, the others get what the formula says.
void test_masked_garbage() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 2, 5, 60})
      for (const double garbage : {kNaN, kInfinity, -kInfinity})
        for (const int in : {0, 1, 2}) {  // v, k, both
          // A visible infinite k can make a score of -inf, which hides its key only where v is finite
          // (docs/numerics.md).
          if (in == 2 && !std::isnan(garbage)) continue;
          const auto spoil = [&](Problem& problem, std::initializer_list<int64_t> keys) {
            for (const int64_t j : keys) {
              if (in != 0) problem.k.set({1, 1, j, 3}, garbage);
              if (in != 1) problem.v.set({1, 1, j, 2}, garbage);
            }
          };
          Case c = with_options(dtype, rows);
          c.causal = true;
          c.q_offset = {146 - rows};  // the last row sees keys up to 145
          Problem causal(c);
          spoil(causal, {140, 145, 146, 149});
          check(causal);

          c = with_options(dtype, rows);
          c.window_left = 10;
          c.window_right = 10;
          c.q_offset = {50};
          Problem window(c);
          spoil(window, {0, 39, 45, 61, 149});
          check(window);

          c = with_options(dtype, rows);
          c.mask = 12;
          Problem mask(c);
          spoil(mask, {7, 70, 140});
          for (int64_t i = 0; i < rows; ++i)
            for (const int64_t j : {7, 70, 140})
              static_cast<uint8_t*>(mask.mask.view.data)[mask.mask.offset({0, 0, i, j})] = i % 3 == 1 && j == 70;
          check(mask);

          c = with_options(dtype, rows);
          c.kv_lens = {150, 130};
          Problem lens(c);
          spoil(lens, {130, 131, 149});
          check(lens);
        }
}

// A NaN row spoils itself and none of its neighbours; so does a NaN bias, and an infinite one.
void test_garbage_rows() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {2, 4, 30})
      for (const double garbage : {kNaN, kInfinity}) {
        Case c = with_options(dtype, rows);
        Problem query(c);
        query.q.set({0, 1, rows / 2, 0}, kNaN);
        check(query);
        c.bias = 15;
        Problem bias(c);
        bias.bias.set({1, 2, rows / 2, 77}, garbage);
        check(bias);
      }
}

// ---- the same bits --------------------------------------------------------------------------------------------------

Case varied(DType dtype, int64_t rows, int64_t keys, bool weights) {
  Case c = with_options(dtype, rows);
  c.seqlen_kv = keys;
  c.causal = true;
  c.mask = 12;
  c.softcap = 10;
  c.alibi = true;
  c.sinks = true;
  c.weights = weights;
  return c;
}

void test_threads() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 30, 300})
      for (const int64_t keys : {int64_t{200}, kForwardPart + 900})
        for (const KernelTable* table : tables()) {
          const Case c = varied(dtype, rows, keys, rows == 30);
          Problem one(c), many(c);
          compute(one, *table, 1);
          for (const int threads : {1, 2, 5}) {
            compute(many, *table, threads);
            const std::string what =
                std::string(table->name) + ' ' + text_of(c) + " by " + std::to_string(threads) + " threads";
            expect_same(one.out, many.out, what);
            expect_same(one.lse, many.lse, what);
            if (c.weights) expect_same(one.weights, many.weights, what);
          }
        }
}

// Copies the elements that both have, index by index.
void copy_common(const Array& from, Array& to, const std::vector<int64_t>& begin_from) {
  std::vector<int64_t> index(static_cast<size_t>(to.view.rank), 0);
  const int64_t n = to.count();
  for (int64_t x = 0; x < n; ++x) {
    std::vector<int64_t> source = index;
    for (size_t axis = 0; axis < index.size(); ++axis) source[axis] += begin_from[axis];
    const int64_t item = foveal::itemsize(to.view.dtype);
    std::memcpy(static_cast<uint8_t*>(to.view.data) + to.offset(index) * item,
                static_cast<const uint8_t*>(from.view.data) + from.offset(source) * item, static_cast<size_t>(item));
    for (size_t axis = index.size(); axis-- > 0 && ++index[axis] == to.view.shape[axis];) index[axis] = 0;
  }
}

// A padded batch of many heads against each sequence and head alone.
void test_alone() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {1, 3, 50, 250})
      for (const int64_t keys : {int64_t{200}, kForwardPart + 900})
        for (const bool lens : {false, true}) {
          if (rows == 250 && keys > 200 && dtype != DType::kFloat32) continue;  // nothing new, and slow
          Case c = varied(dtype, rows, keys, false);
          c.alibi = c.sinks = false;  // per head
          if (lens) {
            c.q_lens = {rows, (rows + 1) / 2};
            c.kv_lens = {keys - 70, keys / 2};
          }
          Problem batch(c);
          for (const KernelTable* table : tables()) {
            compute(batch, *table, 2);
            for (int64_t b = 0; b < c.batch; ++b)
              for (int64_t kv_head = 0; kv_head < c.kv_heads; ++kv_head) {
                Case single = c;
                single.batch = single.kv_heads = 1;
                single.heads = c.heads / c.kv_heads;
                single.seqlen_q = lens ? c.q_lens[static_cast<size_t>(b)] : rows;
                single.seqlen_kv = lens ? c.kv_lens[static_cast<size_t>(b)] : keys;
                single.q_lens.clear();
                single.kv_lens.clear();
                single.k_storage = Storage::kBshd;
                Problem alone(single);
                const int64_t head = kv_head * single.heads;
                copy_common(batch.q, alone.q, {b, head, 0, 0});
                copy_common(batch.k, alone.k, {b, kv_head, 0, 0});
                copy_common(batch.v, alone.v, {b, kv_head, 0, 0});
                copy_common(batch.mask, alone.mask, {0, 0, 0, 0});
                compute(alone, *table);
                Array out(c.dtype, {1, single.heads, single.seqlen_q, c.value_dim});
                copy_common(batch.out, out, {b, head, 0, 0});
                const std::string what = std::string(table->name) + ' ' + text_of(c) + " sequence " +
                                         std::to_string(b) + " head " + std::to_string(head);
                expect_same(out, alone.out, what + " out");
                Array lse(alone.lse.view.dtype, {1, single.heads, single.seqlen_q});
                copy_common(batch.lse, lse, {b, head, 0});
                expect_same(lse, alone.lse, what + " lse");
              }
          }
        }
}

// The many-rows kernel: a row keeps its bits whatever the rows beside it hold, and wherever in a tile it lies.
void test_neighbours() {
  for (const DType dtype : kDTypes)
    for (const KernelTable* table : tables()) {
      Case c = with_options(dtype, 60);
      c.heads = c.kv_heads = 1;
      c.batch = 1;
      c.seqlen_kv = 333;
      c.mask = 12;
      Problem problem(c), shifted(c);
      // Row i of the one is row i + 7 of the other, among other contents.
      const std::vector<int64_t> moved = {0, 0, 7, 0};
      shifted.q.fill_with([&] { return shifted.uniform(-3, 3); });
      for (int64_t i = 0; i + 7 < c.seqlen_q; ++i) {
        for (int64_t d = 0; d < c.head_dim; ++d) shifted.q.set({0, 0, i + 7, d}, problem.q.at({0, 0, i, d}));
        for (int64_t j = 0; j < c.seqlen_kv; ++j)
          static_cast<uint8_t*>(shifted.mask.view.data)[shifted.mask.offset({0, 0, i + 7, j})] =
              static_cast<const uint8_t*>(problem.mask.view.data)[problem.mask.offset({0, 0, i, j})];
      }
      copy_common(problem.k, shifted.k, {0, 0, 0, 0});
      copy_common(problem.v, shifted.v, {0, 0, 0, 0});
      compute(problem, *table);
      compute(shifted, *table);
      Array here(dtype, {1, 1, c.seqlen_q - 7, c.value_dim}), there(dtype, {1, 1, c.seqlen_q - 7, c.value_dim});
      copy_common(problem.out, here, {0, 0, 0, 0});
      copy_common(shifted.out, there, moved);
      expect_same(here, there, std::string(table->name) + ' ' + text_of(c) + " seven rows on");
    }
}

// ---- choice ---------------------------------------------------------------------------------------------------------

void test_tables() {
  std::set<std::string> names;
  for (const KernelTable* table : tables()) names.insert(table->name);
  FOVEAL_CHECK_EQ(names.size(), tables().size());
  FOVEAL_CHECK_EQ(names.count("scalar"), size_t{1});
  FOVEAL_CHECK(foveal::find_table("sse9") == nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  return run_groups(argc, argv,
                    {{"tables", test_tables},
                     {"lengths", test_lengths},
                     {"head_dims", test_head_dims},
                     {"parts", test_parts},
                     {"options", test_options},
                     {"normalizers", test_normalizers},
                     {"additive", test_additive},
                     {"storage", test_storage},
                     {"mixtures", test_mixtures},
                     {"moving_maximum", test_moving_maximum},
                     {"masked_garbage", test_masked_garbage},
                     {"garbage_rows", test_garbage_rows},
                     {"threads", test_threads},
                     {"alone", test_alone},
                     {"neighbours", test_neighbours}});
}
