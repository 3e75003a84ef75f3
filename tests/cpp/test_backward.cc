// The backward pass of every kernel table that this machine runs, against the float64 oracle and against itself.
//
// Values: within GradientBound of the oracle for each dtype, shapes around the kernels' own boundaries, every option
// alone and in random mixtures, and every memory layout. Bits: the same for any number of threads and for each sequence
// alone. What a pair is masked from does not reach it.
//
// test_backward [GROUP...] runs the groups named at the end of this file, or all.
#include <string>

#include "attention/plan.h"
#include "attention_case.h"
#include "attention_check.h"
#include "case_lists.h"
#include "check.h"

namespace {

using namespace foveal_test;
using foveal::AttentionGradients;
using foveal::CanonicalGradients;
using foveal::Status;

constexpr int64_t kGradientKeys = 64;      // a key block of the backward kernel
constexpr int64_t kRowsABlock = 192;       // rows that share it
constexpr int64_t kKeysWorthAnItem = 256;  // where few heads are cut

// A forward problem, what flows back into it, and what comes out. `dbias` has the extents of `bias`.
struct Gradients {
  Problem problem;
  Array dout, dlse, dentropy, dq, dk, dv, dbias, dsinks, dgate_tau, dgate_temperature, dspan, du;

  explicit Gradients(const Case& c, bool with_dlse = false) : problem(c) {
    const DType accumulator = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    dout = Array(c.dtype, {c.batch, c.heads, c.seqlen_q, c.value_dim}, c.out_storage);
    dout.fill_with([&] { return problem.uniform(-1, 1); });
    if (with_dlse) {
      dlse = Array(accumulator, {c.batch, c.heads, c.seqlen_q});
      dlse.fill_with([&] { return problem.uniform(-1, 1); });
    }
    if (c.stats) {
      dentropy = Array(accumulator, {c.batch, c.heads, c.seqlen_q});
      dentropy.fill_with([&] { return problem.uniform(-1, 1); });
    }
    allocate(c.dtype, accumulator, c.out_storage);
  }

  void allocate(DType dtype, DType accumulator, Storage storage) {
    const Case& c = problem.asked;
    dq = Array(dtype, {c.batch, c.heads, c.seqlen_q, c.head_dim}, storage);
    dk = Array(dtype, {c.batch, c.kv_heads, c.seqlen_kv, c.head_dim}, storage);
    dv = Array(dtype, {c.batch, c.kv_heads, c.seqlen_kv, c.value_dim}, storage);
    const TensorView& bias = problem.bias.view;
    if (bias.present()) dbias = Array(accumulator, {bias.shape, bias.shape + 4});
    if (c.sinks) dsinks = Array(accumulator, {c.heads});
    const auto like = [&](const Array& option) {
      return option.view.present() ? Array(accumulator, {option.view.shape, option.view.shape + option.view.rank})
                                   : Array();
    };
    dgate_tau = like(problem.gate_tau);
    dgate_temperature = like(problem.gate_temperature);
    dspan = like(problem.span);
    du = like(problem.u);
  }

  AttentionGradients views() const {
    AttentionGradients g;
    g.dout = dout.view;
    g.dlse = dlse.view;
    g.dentropy = dentropy.view;
    g.dq = dq.view;
    g.dk = dk.view;
    g.dv = dv.view;
    g.dbias = dbias.view;
    g.dsinks = dsinks.view;
    g.dgate_tau = dgate_tau.view;
    g.dgate_temperature = dgate_temperature.view;
    g.dspan = dspan.view;
    g.dadditive = du.view;
    return g;
  }

  template <class Visit>
  void for_each_result(Visit visit) {
    visit("dq", dq);
    visit("dk", dk);
    visit("dv", dv);
    if (dbias.view.present()) visit("dbias", dbias);
    if (dsinks.view.present()) visit("dsinks", dsinks);
    if (dgate_tau.view.present()) visit("dgate_tau", dgate_tau);
    if (dgate_temperature.view.present()) visit("dgate_temperature", dgate_temperature);
    if (dspan.view.present()) visit("dspan", dspan);
    if (du.view.present()) visit("du", du);
  }
};

void forward(Gradients& x, const KernelTable& table) {
  Status status;
  const foveal::CanonicalProblem p = x.problem.canonical(status);
  foveal::ExecutionOptions options;
  options.table = &table;
  if (status.ok()) status = attention_forward(p, options);
  if (!status.ok()) fail(__FILE__, __LINE__, text_of(x.problem.asked) + ": " + status.message());
}

void backward(Gradients& x, const KernelTable& table, int threads = 1) {
  x.for_each_result([](const char*, Array& array) { array.poison(); });
  Status status;
  const CanonicalGradients g = canonicalize(x.problem.given(), x.views(), status);
  foveal::ExecutionOptions options;
  options.table = &table;
  options.num_threads = threads;
  if (status.ok()) status = attention_backward(g, options);
  if (!status.ok()) fail(__FILE__, __LINE__, text_of(x.problem.asked) + ": " + status.message());
  ++cases_run;
}

// The oracle's gradients, unrounded, into fresh float64 arrays.
struct Truth {
  Array dq, dk, dv, dbias, dsinks, dgate_tau, dgate_temperature, dspan, du;
  double largest_column = 0;  // of P: what a key's sums over rows hold at most
};

Truth oracle(const Gradients& x) {
  const Case& c = x.problem.asked;
  Truth truth;
  truth.dq = Array(DType::kFloat64, {c.batch, c.heads, c.seqlen_q, c.head_dim});
  truth.dk = Array(DType::kFloat64, {c.batch, c.kv_heads, c.seqlen_kv, c.head_dim});
  truth.dv = Array(DType::kFloat64, {c.batch, c.kv_heads, c.seqlen_kv, c.value_dim});
  Status status;
  CanonicalGradients g = canonicalize(x.problem.given(), x.views(), status);
  if (!status.ok()) fail(__FILE__, __LINE__, text_of(c) + ": " + status.message());
  g.dq = truth.dq.view;
  g.dk = truth.dk.view;
  g.dv = truth.dv.view;
  if (g.dbias.present()) {
    truth.dbias = Array(DType::kFloat64, {x.dbias.view.shape, x.dbias.view.shape + 4});
    g.dbias.data = truth.dbias.view.data;  // contiguous both: the strides are those of the elements
    g.dbias.dtype = DType::kFloat64;
  }
  if (g.dsinks.present()) {
    truth.dsinks = Array(DType::kFloat64, {c.heads});
    g.dsinks = truth.dsinks.view;
  }
  const auto own = [](TensorView& gradient, Array& exact) {  // contiguous both, as dbias
    if (!gradient.present()) return;
    gradient.data = exact.view.data;
    gradient.dtype = DType::kFloat64;
  };
  const auto like = [](const Array& found) {
    return found.view.present() ? Array(DType::kFloat64, {found.view.shape, found.view.shape + found.view.rank})
                                : Array();
  };
  truth.dgate_tau = like(x.dgate_tau);
  truth.dgate_temperature = like(x.dgate_temperature);
  truth.dspan = like(x.dspan);
  own(g.dgate_tau, truth.dgate_tau);
  own(g.dgate_temperature, truth.dgate_temperature);
  own(g.dspan, truth.dspan);
  truth.du = like(x.du);
  own(g.dadditive, truth.du);
  // The columns of P are dv for a dout of ones.
  Array ones(DType::kFloat64, {c.batch, c.heads, c.seqlen_q, c.value_dim});
  ones.fill(1);
  const AttentionGradients asked = g;
  const double dropout_p = g.problem.dropout_p;
  g.dout = ones.view;
  g.dbias = g.dsinks = g.dgate_tau = g.dgate_temperature = g.dspan = g.dadditive = g.dentropy = {};
  g.problem.dropout_p = 0;  // dropout takes nothing from P, by which dlse flows back
  FOVEAL_CHECK(attention_backward_reference(g).ok());
  truth.largest_column = truth.dv.max_abs_finite();
  static_cast<AttentionGradients&>(g) = asked;
  g.problem.dropout_p = dropout_p;
  FOVEAL_CHECK(attention_backward_reference(g).ok());
  return truth;
}

// How far a kernel may be from the oracle. Notation of ErrorBound: a weight p is off by (w + l) p, w from its score and
// l from the log-sum-exp, which is rounded to the accumulator. dp = dout . v and delta = dout . out, with an `out` that
// was rounded to q's dtype, are off by d in all; |dp - delta| and dlse are at most m. So ds = p (dp - delta) is off by
// p b, b = (w + l) m + d, and sums of it with factors up to f, over weights that come to W, by W f (b + s m), s from
// the order of the sum. W is 1 along keys, the largest column along rows. Where the kernel rounds p and ds before it
// sums them, s is that rounding more; dbias sums what is not rounded.
class GradientBound {
 public:
  GradientBound(Gradients& x, const Truth& truth, const KernelTable& table) : bound_(x.problem, false) {
    const Case& c = x.problem.asked;
    const double lse = x.problem.lse.max_abs_finite();
    weight_ = bound_.weight() + 8 * bound_.unit() * (1 + lse);
    const double terms = static_cast<double>(c.value_dim);
    const double kept = c.dropout_p > 0 && c.dropout_p < 1 ? 1 / (1 - c.dropout_p) : 1;
    const double product = kept * longest(x.dout, c.value_dim) * longest(x.problem.v, c.value_dim);
    // The entropy adds dH (log p + H) / W to dp, at most 2 log n of a weight that counts.
    const double entropy = c.stats ? 2 * (1 + std::log(static_cast<double>(std::max<int64_t>(c.seqlen_kv, 1)))) : 0;
    const double mean = 2 * product + (x.dlse.view.present() ? 1 : 0) + entropy;
    // The error of out enters delta: of its weights, which sum to at most 1 and may have been rounded, and its own.
    const double score_error = weight_ * mean + 2 * bound_.sum(terms) * product +
                               (weight_ + 2 * bound_.rounding()) * product + 4 * bound_.unit() * mean;
    const double rows = static_cast<double>(c.seqlen_q * c.heads / std::max<int64_t>(c.kv_heads, 1));
    const double keys = static_cast<double>(c.seqlen_kv);
    const double scale = c.scale != 0 ? std::fabs(c.scale) : 1 / std::sqrt(static_cast<double>(c.head_dim));
    const double rounded = kernels_for(table, c.dtype).rounds_gradients ? bound_.rounding() : 0;
    column_ = truth.largest_column;
    dq_ = scale * x.problem.k.max_abs_finite() * (score_error + (bound_.sum(keys) + rounded) * mean);
    dk_ = scale * x.problem.q.max_abs_finite() * column_ * (score_error + (bound_.sum(rows) + rounded) * mean);
    dv_ = kept * x.dout.max_abs_finite() * column_ * (weight_ + bound_.sum(rows) + rounded);
    if (!ErrorBound::by_factor(c)) {
      // ds = g (dp - delta), g the slope of the weight: at most 1, off by at most `slope`, the slopes of a row by
      // `slopes` and their sum at most `sum`. delta is off as dp is, and by the slopes once more.
      const double n = std::max(keys, 1.0), e = 2 * bound_.score() + 8 * bound_.unit();
      const bool sparse = c.normalizer == foveal::Normalizer::kSparsemax;
      const double slope = sparse ? 0 : e;
      const double sum = c.normalizer == foveal::Normalizer::kEntmax15 ? std::sqrt(n) : n;
      const double of_dp = 4 * bound_.sum(terms) * product + (2 * bound_.sum(keys) + 8 * bound_.unit()) * mean;
      const double row = 2 * n * slope * mean + sum * (of_dp + rounded * mean);
      const double one = 2 * n * slope * mean + of_dp + (bound_.sum(rows) + rounded) * mean;
      const double largest = std::max(1.0, bound_.others().weights);
      dq_ = scale * x.problem.k.max_abs_finite() * row;
      dk_ = scale * x.problem.q.max_abs_finite() * rows * one;
      dv_ = kept * x.dout.max_abs_finite() * rows * (bound_.others().weight + (bound_.sum(rows) + rounded) * largest);
      column_ = rows;
      if (x.dbias.view.present()) dbias_ = static_cast<double>(c.batch * c.heads) * (n * rows) * (one + of_dp);
    }
    // ds of a row, over scale * |k|: what a gate's and a span's own gradients sum, by factors of at most 1 / T, that
    // times the argument, and 1 / (1 / 8). A gate's slope 1 + rest / T is 1 + 1 / T at most, and off by e / T^2, where
    // dp is at most `mean` and ds off by 2 e mean already.
    const double most = 1 / kLeastTemperature, bent = c.gate >= 0 ? 1 + most + most * most / 2 : 1;
    const bool additive = c.additive >= 0;
    const double of_row = dq_ / std::max(scale * x.problem.k.max_abs_finite(), 1e-300);
    const double all_rows = static_cast<double>(c.batch * c.heads * c.seqlen_q);
    const auto summed = [&](const Array& gradient) {
      return all_rows / static_cast<double>(std::max<int64_t>(gradient.count(), 1));
    };
    gate_ = of_row * most * bent;
    dtau_ = gate_ * summed(x.dgate_tau);
    dtemperature_ = gate_ * (1 + bound_.gate_argument()) * summed(x.dgate_temperature);
    dspan_ = 8 * of_row * summed(x.dspan);
    if (additive) {
      // A score's gradient is that times u (1 - t^2), t off by as much as a term of a score: at most `term`, and
      // bounded by 1.
      const double u_most = x.problem.u.max_abs_finite();
      const double term = bound_.unit() * (24 + 4 * (x.problem.q.max_abs_finite() + x.problem.k.max_abs_finite()));
      const double of_key = dk_ / std::max(scale * x.problem.q.max_abs_finite(), 1e-300);
      const double gradients = 2 * mean * bent;  // the sum of |ds| along a row, at most, were the weights 1
      dq_ = u_most * (of_row + 2 * term * gradients * (ErrorBound::by_factor(c) ? 1 : keys));
      dk_ = u_most * (of_key + 2 * term * gradients * (ErrorBound::by_factor(c) ? column_ : rows * keys));
      du_ = bent * (of_row + term * gradients * (ErrorBound::by_factor(c) ? 1 : keys)) * all_rows *
            (c.softcap > 0 ? 4 : 1);
    }
    dq_ *= bent;
    dk_ *= bent;
    bent_ = bent;
    if (c.softcap > 0) {  // the slope 1 - t^2 is off by as much as t, whose argument is the score
      dq_ *= 4;
      dk_ *= 4;
    }
    if (x.dbias.view.present() && ErrorBound::by_factor(c)) {
      const int64_t* own = x.dbias.view.shape;
      double weights = 1;
      if (own[3] < c.seqlen_kv)
        weights = own[2] < c.seqlen_q ? static_cast<double>(c.seqlen_q) : 1;
      else if (own[2] < c.seqlen_q)
        weights = column_;
      if (own[0] < c.batch) weights *= static_cast<double>(c.batch);
      if (own[1] < c.heads) weights *= static_cast<double>(c.heads);
      const double count = static_cast<double>(c.batch * c.heads * c.seqlen_q) * keys;
      dbias_ = weights * (score_error + bound_.sum(count) * mean);
    }
    if (c.sinks)
      dsinks_ = static_cast<double>(c.batch * c.seqlen_q) * (score_error + (weight_ + 8 * bound_.unit()) * mean);
  }

  double operator()(const std::string& name, double x) const {
    if (name == "dgate_tau") return dtau_ + 4 * bound_.unit() * std::fabs(x);
    if (name == "dgate_temperature") return dtemperature_ + 4 * bound_.unit() * std::fabs(x);
    if (name == "du") return du_ + 4 * bound_.unit() * std::fabs(x);
    if (name == "dspan") return dspan_ + 4 * bound_.unit() * std::fabs(x);
    if (name == "dbias") return bent_ * dbias_ + 4 * bound_.unit() * std::fabs(x);
    if (name == "dsinks") return dsinks_ + 4 * bound_.unit() * std::fabs(x);
    return (name == "dq"   ? dq_
            : name == "dk" ? dk_
                           : dv_) *
               (1 + bound_.rounding()) +
           bound_.rounding(x) + 4 * bound_.unit() * std::fabs(x);
  }

 private:
  static double longest(const Array& array, int64_t width) {
    double most = 0, square = 0;
    int64_t column = 0;
    array.for_each([&](int64_t offset) {
      const double x = foveal::load_element(array.view, offset);
      if (std::isfinite(x)) square += x * x;
      if (++column < width) return;
      most = std::max(most, square);
      square = 0;
      column = 0;
    });
    return std::sqrt(most);
  }

  ErrorBound bound_;
  double weight_ = 0, column_ = 0, dq_ = 0, dk_ = 0, dv_ = 0, dbias_ = 0, dsinks_ = 0;
  double gate_ = 0, bent_ = 1, dtau_ = 0, dtemperature_ = 0, dspan_ = 0, du_ = 0;
};

void check(Gradients& x) {
  const Truth truth = oracle(x);
  for (const KernelTable* table : tables()) {
    forward(x, *table);
    backward(x, *table);
    const GradientBound bound(x, truth, *table);
    const std::string where = std::string(table->name) + ' ' + text_of(x.problem.asked) + ": ";
    x.for_each_result([&](const char* name, Array& found) {
      const std::string which = name;
      const Array& expected = which == "dq"          ? truth.dq
                              : which == "dk"        ? truth.dk
                              : which == "dv"        ? truth.dv
                              : which == "dbias"     ? truth.dbias
                              : which == "dsinks"    ? truth.dsinks
                              : which == "dgate_tau" ? truth.dgate_tau
                              : which == "dspan"     ? truth.dspan
                              : which == "du"        ? truth.du
                                                     : truth.dgate_temperature;
      compare(where + name, found, expected, [&](double want) { return bound(which, want); });
      if (!found.gaps_untouched()) fail(__FILE__, __LINE__, where + "memory between the elements of " + which);
    });
  }
}

void check(const Case& c, bool with_dlse = false) {
  Gradients x(c, with_dlse);
  check(x);
}

// ---- values ---------------------------------------------------------------------------------------------------------

void test_lengths() {
  for (const DType dtype : kDTypes) {
    Case c;
    c.dtype = dtype;
    c.head_dim = 9;
    c.value_dim = 5;
    for (const int64_t rows : {0, 1, 2, 3, 4, 7, 8, 12, 13, 16, 17, 24, 25, 31, 33, 47, 48, 49})
      for (const int64_t keys : {0, 1, 2, 5, 6, 7, 63, 64, 65}) {
        c.seqlen_q = rows;
        c.seqlen_kv = keys;
        c.causal = (rows + keys) % 2 == 0;
        ++c.seed;
        check(c, rows % 2 == 0);
      }
    for (const int64_t rows : around({kRowsABlock}))  // over several blocks of rows
      for (const bool causal : {false, true}) {
        c.seqlen_q = rows;
        c.seqlen_kv = 2 * kGradientKeys + 3;
        c.causal = causal;
        check(c);
      }
  }
}

void test_head_dims() {
  for (const DType dtype : kDTypes)
    for (const int64_t head_dim : around({1, 4, 8, 16, 32, 64, 128}))
      for (const int64_t rows : {1, 20}) {
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

Case with_options(DType dtype, int64_t rows) { return grouped(dtype, rows, 75, 10, 7); }

void test_options() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {2, 29}) {
      Variations list = each_option(with_options(dtype, rows), kGradientKeys);
      for (int axes = 0; axes < 16; axes += 3)
        list.add([&](Case& c) { c.bias = axes, c.bias_dtype = kDTypes[axes % 4], c.softcap = 4; });
      for (const double dropout_p : {0.1, 0.9, 1.0})
        list.add([&](Case& c) { c.dropout_p = dropout_p, c.causal = true, c.bias = 15, c.sinks = true; });
      for (const std::vector<int64_t>& lens : std::vector<std::vector<int64_t>>{{0, 75}, {74, 1}, {64, 65}})
        list.add([&](Case& c) { c.kv_lens = lens, c.causal = true, c.bias = 15; });
      list.add([](Case& c) { c.seqlen_q = 0, c.bias = 0; });
      list.add([](Case& c) { c.seqlen_kv = 0, c.bias = 4, c.sinks = true; });
      for (Case c : list.cases) {
        c.stats = c.seed % 2 == 0;
        check(c, c.seed % 3 == 0);
      }
    }
}

void test_additive() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64})
    for (const int64_t rows : {2, 29})
      for (Case c : each_additive(with_options(dtype, rows)).cases) {
        c.stats = c.seed % 2 == 0;
        check(c);
      }
}

// Every option under every other normaliser, for the few-rows and the many-rows kernel of the forward pass.
void test_normalizers() {
  for (const Normalizer normalizer : kOtherNormalizers)
    for (const DType dtype : kDTypes)
      for (const int64_t rows : {2, 29}) {
        Case base = with_options(dtype, rows);
        base.normalizer = normalizer;
        base.scale = 1.5;
        Variations list = each_option(base, kGradientKeys);
        for (const double dropout_p : {0.1, 1.0})
          list.add([&](Case& c) { c.dropout_p = dropout_p, c.causal = true, c.bias = 15, c.softcap = 4; });
        for (const Case& c : list.cases)
          if (dtype == DType::kFloat64 || c.seed % 2 == 0) check(c);
      }
}

void test_storage() {
  for (const DType dtype : kDTypes) {
    Case c = with_options(dtype, 23);
    c.causal = true;
    size_t x = 0;
    for (const Storage input : kInputStorages)
      for (Storage Case::* array : {&Case::q_storage, &Case::k_storage, &Case::v_storage}) {
        Case one = c;
        one.*array = input;
        one.heads = x % 2 == 0 ? 4 : 2;
        one.out_storage = kOutputStorages[x++ % std::size(kOutputStorages)];
        check(one);
        one.head_dim = 32;  // whole vectors, which are read in place
        one.value_dim = 16;
        check(one);
      }
  }
}

void test_mixtures() {
  RandomCases cases(60, 200);
  for (int x = 0; x < 300; ++x) {
    const Case c = cases.next();
    const bool with_dlse = cases.chance(3);
    check(c, with_dlse && ErrorBound::by_factor(c));  // of the others there is no lse
  }
}

// ---- what must not be read ------------------------------------------------------------------------------------------

// NaN and infinity where a pair is masked: in k and v, whose gradients and whose rows stay clean, and in q and dout,
// beyond q_len and in rows that some keys are hidden from.
void test_masked_garbage() {
  for (const DType dtype : kDTypes)
    for (const int64_t rows : {5, 60})
      for (const double garbage : {kNaN, kInfinity, -kInfinity}) {
        Case c = with_options(dtype, rows);
        c.softcap = rows == 60 ? 8 : 0;
        c.causal = true;
        c.q_offset = {70 - rows};  // the last row sees keys up to 69
        Gradients causal(c);
        for (const int64_t j : {70, 74}) {
          causal.problem.k.set({1, 1, j, 3}, garbage);
          causal.problem.v.set({1, 1, j, 2}, garbage);
        }
        check(causal);
        if (std::isnan(garbage)) {  // seen by the last rows alone
          causal.problem.k.set({0, 0, 68, 1}, garbage);
          causal.problem.v.set({0, 1, 69, 2}, garbage);
          causal.problem.q.set({1, 2, rows / 2, 1}, garbage);
          causal.dout.set({1, 1, rows / 2, 1}, garbage);
          check(causal);
        }

        c = with_options(dtype, rows);
        c.mask = 12;
        c.softcap = rows == 60 ? 8 : 0;
        Gradients mask(c);
        for (const int64_t j : {7, 70}) {
          if (j == 7) mask.problem.k.set({1, 1, j, 3}, garbage);  // in the other block, v alone
          mask.problem.v.set({1, 1, j, 2}, garbage);
          for (int64_t i = 0; i < rows; ++i)
            static_cast<uint8_t*>(mask.problem.mask.view.data)[mask.problem.mask.offset({0, 0, i, j})] =
                std::isnan(garbage) && i % 3 == 1 && j == 70;
        }
        check(mask);

        c = with_options(dtype, rows);
        c.kv_lens = {75, 66};
        c.q_lens = {rows - 2, rows};
        Gradients lens(c);
        for (const int64_t j : {66, 74}) {
          lens.problem.k.set({1, 1, j, 3}, garbage);
          lens.problem.v.set({1, 1, j, 2}, garbage);
        }
        lens.problem.q.set({0, 1, rows - 1, 0}, garbage);
        lens.dout.set({0, 1, rows - 2, 0}, garbage);
        check(lens);
      }
}

// ---- the same bits --------------------------------------------------------------------------------------------------

// Few heads are cut into ranges of keys, by how many threads there are.
void test_threads() {
  for (const DType dtype : kDTypes)
    for (const int64_t heads : {1, 3})
      for (const KernelTable* table : tables()) {
        Case c = with_options(dtype, 450);
        c.batch = 1;
        c.heads = c.kv_heads = heads;
        c.seqlen_kv = 4 * kKeysWorthAnItem + 9;
        c.causal = heads == 1;
        c.window_left = heads == 1 ? 700 : foveal::kUnlimited;
        c.sinks = true;
        c.softcap = 10;
        c.dropout_p = heads == 1 ? 0.2 : 0;
        for (const int bias : {-1, 12, 4, 15}) {
          c.bias = bias;
          Gradients one(c, true), many(c, true);
          forward(one, *table);
          forward(many, *table);
          backward(one, *table, 1);
          for (const int threads : {2, 5, 16}) {
            backward(many, *table, threads);
            const std::string where =
                std::string(table->name) + ' ' + text_of(c) + " by " + std::to_string(threads) + " threads: ";
            expect_same(one.dq, many.dq, where + "dq");
            expect_same(one.dk, many.dk, where + "dk");
            expect_same(one.dv, many.dv, where + "dv");
            expect_same(one.dsinks, many.dsinks, where + "dsinks");
            if (bias >= 0) expect_same(one.dbias, many.dbias, where + "dbias");
          }
        }
      }
}

// dq, dk and dv of a padded batch are those of each sequence and key/value head alone.
void test_alone() {
  for (const DType dtype : kDTypes)
    for (const KernelTable* table : tables())
      for (const bool causal : {false, true}) {
        Case c = with_options(dtype, 230);
        c.seqlen_kv = 300;
        c.causal = causal;
        c.q_lens = {230, 101};
        c.kv_lens = {170, 300};
        Gradients batch(c);
        forward(batch, *table);
        backward(batch, *table, 2);
        for (int64_t b = 0; b < c.batch; ++b)
          for (int64_t kv_head = 0; kv_head < c.kv_heads; ++kv_head) {
            Case single = c;
            single.batch = single.kv_heads = 1;
            single.heads = c.heads / c.kv_heads;
            single.seqlen_q = c.q_lens[static_cast<size_t>(b)];
            single.seqlen_kv = c.kv_lens[static_cast<size_t>(b)];
            single.q_lens.clear();
            single.kv_lens.clear();
            single.q_storage = Storage::kBshd;
            Gradients alone(single);
            const auto copy = [](const Array& from, Array& to, int64_t batch, int64_t head) {
              for (int64_t h = 0; h < to.view.shape[1]; ++h)
                for (int64_t i = 0; i < to.view.shape[2]; ++i)
                  for (int64_t d = 0; d < to.view.shape[3]; ++d) to.set({0, h, i, d}, from.at({batch, head + h, i, d}));
            };
            const int64_t head = kv_head * single.heads;
            copy(batch.problem.q, alone.problem.q, b, head);
            copy(batch.problem.k, alone.problem.k, b, kv_head);
            copy(batch.problem.v, alone.problem.v, b, kv_head);
            copy(batch.dout, alone.dout, b, head);
            forward(alone, *table);
            backward(alone, *table);
            const std::string where = std::string(table->name) + ' ' + text_of(c) + " sequence " + std::to_string(b);
            Array dq(c.dtype, {1, single.heads, single.seqlen_q, c.head_dim});
            Array dk(c.dtype, {1, 1, single.seqlen_kv, c.head_dim}), dv(c.dtype, {1, 1, single.seqlen_kv, c.value_dim});
            copy(batch.dq, dq, b, head);
            copy(batch.dk, dk, b, kv_head);
            copy(batch.dv, dv, b, kv_head);
            expect_same(dq, alone.dq, where + " dq");
            expect_same(dk, alone.dk, where + " dk");
            expect_same(dv, alone.dv, where + " dv");
          }
      }
}

// ---- what is refused ------------------------------------------------------------------------------------------------

void test_refusals() {
  const auto text = [](auto spoil) {
    Gradients x(with_options(DType::kFloat32, 3), true);
    AttentionGradients g = x.views();
    Status status;
    AttentionProblem p = x.problem.given();
    spoil(p, g);
    canonicalize(p, g, status);
    return status.message();
  };
  using P = AttentionProblem;
  using G = AttentionGradients;
  FOVEAL_CHECK_EQ(text([](P&, G&) {}), "");
  FOVEAL_CHECK_EQ(text([](P& p, G&) { p.lse = {}; }), "attention: lse is absent, expected that of the forward pass");
  FOVEAL_CHECK_EQ(text([](P&, G& g) { g.dout.dtype = DType::kFloat64; }),
                  "attention: dout has dtype float64, expected float32");
  FOVEAL_CHECK_EQ(text([](P&, G& g) { --g.dout.shape[3]; }),
                  "attention: dout has shape (2, 4, 3, 6), expected (2, 4, 3, 7) in the order (B, H, S, D)");
  FOVEAL_CHECK_EQ(text([](P&, G& g) { g.dk.stride[2] = 0; }),
                  "attention: dk has elements that share memory, expected an array without overlap");
  FOVEAL_CHECK_EQ(text([](P&, G& g) { --g.dlse.shape[2]; }),
                  "attention: dlse has shape (2, 4, 2), expected (B, Hq, Sq) = (2, 4, 3)");
}

}  // namespace

int main(int argc, char** argv) {
  return run_groups(argc, argv,
                    {{"lengths", test_lengths},
                     {"head_dims", test_head_dims},
                     {"options", test_options},
                     {"normalizers", test_normalizers},
                     {"additive", test_additive},
                     {"storage", test_storage},
                     {"mixtures", test_mixtures},
                     {"masked_garbage", test_masked_garbage},
                     {"threads", test_threads},
                     {"alone", test_alone},
                     {"refusals", test_refusals}});
}
