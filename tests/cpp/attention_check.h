// What the tests of kernels share: which tables there are, how far a result may be from the oracle, how results are
// compared, and how groups of tests are run.
#pragma once

#include <omp.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "attention_case.h"
#include "check.h"
#include "isa/detect.h"
#include "kernels/kernel_table.h"

namespace foveal_test {

using foveal::KernelTable;

inline const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> found = [] {
    std::vector<const KernelTable*> all;
    for (const std::string& name : foveal::available_isas()) all.push_back(foveal::find_table(name));
    return all;
  }();
  return found;
}

// What the oracle says, unrounded.
struct Answer {
  Array out, lse, weights, entropy, mass, max_weight, threshold, argmax;
};

// How far a kernel may be from the oracle on a problem, for one result of true value x:
//
//   out       (2 e + s) max|v|  +  rounding(x)
//   weights   (2 e + s) x       +  rounding(x)
//   lse       e + s             +  4 u |x|
//
// and where the kernel rounds its weights, max|v| times that more for `out`.
//
// u is the unit roundoff of the accumulator, e bounds the error of a score (which changes a weight and its row's sum by
// a factor of exp(e) each) and s that of sums over keys. A sum of n terms in any order is off by at most lambda sqrt(n)
// u times the sum of their magnitudes, but for a probability of 2 exp(-lambda^2 / 2) (Higham & Mary 2019, theorem 2.4;
// 7 in 10^4 for kLambda = 4, and only where all terms conspire). By Cauchy and Schwarz sum |q_d k_d| <= |q| |k|. Eight
// more roundings stand for the scale, exp2, tanh, and the steps between.
//
// Other normalisers do not change a weight by a factor. With e the error of a score, theirs is off by (RowErrors)
//
//   sparsemax            2 e               a threshold is off by no more than the scores, and has two more roundings
//   entmax15             2 e sqrt(w)       d w = 2 sqrt(w) d(s/2 - tau)
//   sigmoid              e w               and relu by e / n
//   normalized_sigmoid   as softmax, with the error of log sigmoid, which is no more than that of the score
//
// A gate adds log sigmoid((s - tau) / T) to a score, whose error so grows by 1 + 1 / T, with eight roundings of its
// own; a span a logarithm, of a share that is exact but for the division by the ramp.
//
// and what they save of a row by e + s.
class ErrorBound {
 public:
  // Of a normaliser other than softmax, at most: the sum of a row's weights, the error of one, and of their sum.
  struct RowErrors {
    double weights, weight, sum;
  };

  ErrorBound(const Problem& problem, bool rounds_weights) {
    const Case& c = problem.asked;
    const double u = c.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    const double scale = c.scale != 0 ? std::fabs(c.scale) : 1 / std::sqrt(static_cast<double>(c.head_dim));
    // Of additive scores sum |u|, whose terms are off by their argument's rounding, in which tanh has a slope of 1,
    // twice: of the power of q and of k; beside the eight roundings of a power and a reciprocal.
    const bool additive = c.additive >= 0;
    const double arguments = problem.q.max_abs_finite() + problem.k.max_abs_finite();
    const double product = additive ? static_cast<double>(c.head_dim) * problem.u.max_abs_finite()
                                    : scale * longest_row(problem.q, c.head_dim) * longest_row(problem.k, c.head_dim);
    double offset = 0;
    for (const int64_t x : c.q_offset) offset = std::max(offset, std::fabs(static_cast<double>(x)));
    const double distance = offset + static_cast<double>(c.seqlen_q + c.seqlen_kv);
    const double added = (problem.bias.view.present() ? problem.bias.max_abs_finite() : 0) +
                         (problem.slopes.view.present() ? problem.slopes.max_abs_finite() * distance : 0);
    double score = u * ((kLambda * std::sqrt(static_cast<double>(c.head_dim)) + 8) * product + 8 * (1 + added));
    if (additive) score += u * (8 + 4 * arguments) * product;
    argument_ = (product + added + 1) / kLeastTemperature;
    if (c.gate >= 0) score = score * (1 + 1 / kLeastTemperature) + 8 * u * (1 + argument_);
    if (c.span >= 0) score += 8 * u * (1 + std::log(std::max(8 * c.ramp, 1.0)));
    const double sums = u * (kLambda * std::sqrt(static_cast<double>(c.seqlen_kv)) + 8);
    unit_ = u;
    score_ = score;
    const double n = std::max(static_cast<double>(c.seqlen_kv), 1.0), eight = 8 * u, largest = product + added;
    switch (c.normalizer) {
      case foveal::Normalizer::kSparsemax:
        others_ = {1, 2 * score + eight, n * (2 * score + eight)};
        break;
      case foveal::Normalizer::kEntmax15:
        others_ = {1, 2 * score + eight, std::sqrt(n) * (2 * score + eight)};
        break;
      case foveal::Normalizer::kSigmoid:
        others_ = {std::min(n, std::exp(largest)), score + eight, std::min(n, std::exp(largest)) * (score + eight)};
        break;
      case foveal::Normalizer::kRelu:
        others_ = {largest, score + eight * largest, score + eight * largest};
        break;
      default:
        break;
    }
    lse_ = score + sums;
    weight_ = 2 * score + sums;
    if (c.normalizer == foveal::Normalizer::kNormalizedSigmoid) weight_ += 2 * eight;
    sums_ = sums;
    value_scale_ = c.dropout_p > 0 && c.dropout_p < 1 ? 1 / (1 - c.dropout_p) : 1;
    value_ = problem.v.max_abs_finite() * (c.dropout_p > 0 && c.dropout_p < 1 ? 1 / (1 - c.dropout_p) : 1);
    switch (c.dtype) {
      case DType::kFloat16:
        rounding_ = 0x1p-11;
        smallest_ = 0x1p-25;
        break;
      case DType::kBFloat16:
        rounding_ = 0x1p-8;
        smallest_ = 0x1p-126;
        break;
      case DType::kFloat32:
        rounding_ = 0x1p-24;
        smallest_ = 0x1p-126;
        break;
      default:
        rounding_ = 0x1p-53;
        smallest_ = 0x1p-1022;
    }
    weight_rounding_ = rounds_weights ? rounding_ : 0;
  }

  // Whether a weight is off by a factor, as that of softmax.
  static bool by_factor(const Case& c) {
    return c.normalizer == foveal::Normalizer::kSoftmax || c.normalizer == foveal::Normalizer::kNormalizedSigmoid;
  }

  double out(double x) const {
    if (others_.weights > 0)
      return (others_.sum + (sums_ + weight_rounding_) * others_.weights) * value_ * (1 + rounding_) +
             rounding_ * std::fabs(x) + smallest_;
    return (weight_ + weight_rounding_) * value_ * (1 + rounding_) + rounding_ * std::fabs(x) + smallest_;
  }
  double weights(double x) const {
    if (others_.weights > 0) return others_.weight * value_scale_ + rounding_ * x + smallest_;
    return weight_ * x * (1 + rounding_) + rounding_ * x + smallest_;
  }
  double lse(double x) const { return lse_ + 4 * unit_ * std::fabs(x); }

  double weight() const { return weight_; }  // relative, of a weight
  double score() const { return score_; }
  double gate_argument() const { return argument_; }  // (s - tau) / T at most
  // Of the entropy of a row over n keys: H changes by -(log p + H) dp. A weight that is off by a factor 1 + f changes
  // it by f (|log p| p + p H), which sums to 2 f H; one that is off by d, by d log(1 / d) at most.
  double entropy(double n) const {
    const double most = 1 + std::log(std::max(n, 1.0));
    if (others_.weights > 0) {
      const double d = others_.weight + 16 * unit_;
      return n * d * (most + std::fabs(std::log(d))) + 4 * sums_ * most;
    }
    return 2 * (weight_ + 16 * unit_) * most + 4 * sums_ * most;
  }
  double mass(double x) const {
    return others_.weights > 0 ? others_.sum + 2 * sums_ * others_.weights : (weight_ + sums_) * x;
  }
  const RowErrors& others() const { return others_; }
  double unit() const { return unit_; }
  double sum(double terms) const { return unit_ * (kLambda * std::sqrt(terms) + 8); }  // relative to the magnitudes
  double rounding(double x) const { return rounding_ * std::fabs(x) + smallest_; }     // to the result's dtype
  double rounding() const { return rounding_; }

  static double longest_row(const Array& array, int64_t width) {
    double longest = 0, square = 0;
    int64_t column = 0;
    array.for_each([&](int64_t offset) {
      const double x = foveal::load_element(array.view, offset);
      if (std::isfinite(x)) square += x * x;
      if (++column < width) return;
      longest = std::max(longest, square);
      square = 0;
      column = 0;
    });
    return std::sqrt(longest);
  }

  static constexpr double kLambda = 4;

  RowErrors others_ = {};
  double score_ = 0, sums_ = 0, value_scale_ = 1, argument_ = 0;
  double unit_, lse_, weight_, value_, rounding_, weight_rounding_, smallest_;
};

// `found` within bound(x) of every true value x, NaN and infinity exactly where they are expected.
template <class Bound>
void compare(const std::string& where, const Array& found, const Array& expected, Bound bound) {
  std::vector<double> truth;
  expected.for_each([&](int64_t at) { truth.push_back(foveal::load_element(expected.view, at)); });
  size_t x = 0, wrong = 0, worst = 0;
  double excess = 0, value = 0;
  found.for_each([&](int64_t at) {
    const double got = foveal::load_element(found.view, at), want = truth[x];
    const bool same = got == want || (std::isnan(got) && std::isnan(want));
    const double off = std::isfinite(want) ? std::fabs(got - want) - bound(want) : same ? 0 : kInfinity;
    if (!(off <= 0)) {
      if (wrong == 0 || off > excess) worst = x, excess = off, value = got;
      ++wrong;
    }
    ++x;
  });
  if (wrong == 0) return;
  std::ostringstream text;
  text.precision(9);
  text << where << ": " << wrong << " of " << x << " elements are off; element " << worst << " is " << value
       << ", expected " << truth[worst] << " within " << bound(truth[worst]);
  foveal_test::fail(__FILE__, __LINE__, text.str());
}

inline void expect_same(const Array& a, const Array& b, const std::string& what) {
  if (a.contents() != b.contents()) foveal_test::fail(__FILE__, __LINE__, what + ": the bits differ");
}

inline int64_t cases_run = 0;  // calls of a kernel

struct Group {
  const char* name;
  void (*test)();
};

// Runs the groups that the command line names, or all; the status to exit with.
inline int run_groups(int argc, char** argv, std::initializer_list<Group> groups) {
#if defined(__GLIBC__)
  mallopt(M_PERTURB, 0x80);  // fresh memory holds 0x7f: scratch read before it is written would be huge or NaN
#endif
  std::set<std::string> asked(argv + 1, argv + argc);
  const bool all = asked.empty();
  for (const KernelTable* table : tables()) std::printf("%s ", table->name);
  for (const Group& group : groups) {
    if (asked.erase(group.name) == 0 && !all) continue;
    const int64_t before = cases_run;
    const double start = omp_get_wtime();
    group.test();
    std::printf("\n%-18s %6lld calls %6.2f s", group.name, static_cast<long long>(cases_run - before),
                omp_get_wtime() - start);
    std::fflush(stdout);
  }
  std::printf("\n");
  for (const std::string& name : asked) std::fprintf(stderr, "%s: no group is named %s\n", argv[0], name.c_str());
  return asked.empty() ? result() : 2;
}

}  // namespace foveal_test
