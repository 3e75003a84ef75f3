// What the tests of kernels share: which tables there are, and how results are compared.
#pragma once

#include <cmath>
#include <initializer_list>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "attention_case.h"
#include "check.h"
#include "isa/detect.h"

namespace foveal_test {

using foveal::KernelTable;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

inline const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> found = [] {
    std::vector<const KernelTable*> all;
    for (const std::string& name : foveal::available_isas()) all.push_back(foveal::find_table(name));
    return all;
  }();
  return found;
}

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

// x - 1, x, x + 1 for each x given.
inline std::set<int64_t> around(std::initializer_list<int64_t> values) {
  std::set<int64_t> result;
  for (const int64_t x : values)
    for (const int64_t delta : {-1, 0, 1})
      if (x + delta >= 0) result.insert(x + delta);
  return result;
}

template <class T>
T pick(std::mt19937_64& random, std::initializer_list<T> choices) {
  return choices.begin()[random() % choices.size()];
}

}  // namespace foveal_test
