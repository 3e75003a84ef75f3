// The short form of the model check (the long one: heap_model_check.cc): every schedule of some scenarios on the real
// header; and that the checker can fail: for each of the simpler heaps that are wrong, a scenario that shows it, which
// the real heap passes.
#include <set>
#include <string>

#include "check.h"
#include "model/variants.h"

namespace {

using namespace model;

Outcome search(const char* variant, const Scenario& scenario, Options options = {}) {
  const Outcome outcome = find_variant(variant)->search(scenario, options);
  std::printf("%-26s %-52s %9lld states  %s\n", variant, to_string(scenario).c_str(),
              static_cast<long long>(outcome.states), kVerdictName[static_cast<int>(outcome.verdict)]);
  std::fflush(stdout);
  return outcome;
}

void expect_correct(const char* variant, const Scenario& scenario, Options options = {}) {
  const Outcome outcome = search(variant, scenario, options);
  if (outcome.verdict != Verdict::kCorrect) find_variant(variant)->print(scenario, options, outcome.schedule);
  FOVEAL_CHECK(outcome.verdict == Verdict::kCorrect);
}

struct Counterexample {
  const char* variant;
  const char* scenario;
  Verdict verdict;
};

constexpr Counterexample kCounterexamples[] = {
    {"no-dirty-nodes", "- - - - | push(0,2) | push(1,4) pop", Verdict::kNotLinearizable},
    {"help-stops-early", "- - - 2 | pop | peek", Verdict::kLivelock},
    {"no-bump", "- - - 2 | pop | push(0,3) | push(3,2)", Verdict::kWrongEnd},
    {"read-only-check", "- - - 2 | pop | push(0,3) push(3,2)", Verdict::kWrongEnd},
    {"two-tries", "3 1 - - | push(3,4) | push(2,1)", Verdict::kWrongEnd},
    {"helper-without-bump", "4 - - 1 | pop | push(3,1) | peek", Verdict::kWrongEnd},
    {"pop-without-reread", "- - - 4 | push(1,3) priority(3) | pop", Verdict::kNotLinearizable},
    {"no-claim", "- - - 4 | push(1,3) priority(3) | pop", Verdict::kNotLinearizable},
    {"peek-without-settling", "1 3 2 - | pop | pop push(0,1) | peek peek", Verdict::kNotLinearizable},
    {"pop-push-taken-as-atomic", "3 - - - | pop_push_atomic(1) | push(1,2) peek", Verdict::kNotLinearizable},
    {"frozen-versions", "3 1 1 2 | update(2,1) | upsert(1,2) | update(2,2)", Verdict::kWrongEnd},
};

void test_each_simpler_heap_is_caught() {
  std::set<int> caught;
  for (const Counterexample& example : kCounterexamples) {
    const Scenario scenario = parse(example.scenario);
    FOVEAL_CHECK(search(example.variant, scenario).verdict == example.verdict);
    caught.insert(find_variant(example.variant)->number);
    // The real heap does not claim that pop_push is atomic.
    std::string claimed = example.scenario;
    if (const size_t at = claimed.find("_atomic"); at != std::string::npos) claimed.erase(at, 7);
    expect_correct("real", parse(claimed));
  }
  FOVEAL_CHECK(caught.size() == 10);
}

// The header tells the checker what a thread forgets. Without being told, it must find the same answers.
void test_hints_are_right() {
  for (const char* text : {"- - - 2 | pop | push(0,3) push(3,2)", "3 2 - - | push(2,1) | push(3,1) peek",
                           "4 - - 1 | pop | push(3,1) | peek", "2 - - 1 | remove(3) | update(0,1) | priority(3)",
                           "1 - 2 - | pop_push(3) | pop_relaxed"}) {
    const Scenario scenario = parse(text);
    const Options options{.keep_answers = true};
    const Outcome with = search("real", scenario, options);
    ModelAtomics::forgetting = false;
    const Outcome without = search("real", scenario, options);
    ModelAtomics::forgetting = true;
    FOVEAL_CHECK(with.verdict == Verdict::kCorrect && without.verdict == Verdict::kCorrect);
    FOVEAL_CHECK(with.answers == without.answers && with.answers.size() > 1);
  }
}

void test_split_loads() {
  for (const char* text : {"- - - - | push(0,2) | push(1,4) pop", "- - - 2 | pop | push(0,3) push(3,2)",
                           "- - - 4 | push(1,3) priority(3) | pop"}) {
    expect_correct("real-with-split-loads", parse(text));
  }
}

void test_random_scenarios() {
  const std::vector<Kind> kinds = {Kind::kPush, Kind::kUpdate,   Kind::kUpsert,     Kind::kRemove, Kind::kPop,
                                   Kind::kPeek, Kind::kPriority, Kind::kPopRelaxed, Kind::kPopPush};
  std::mt19937 random(20);
  for (int i = 0; i < 120; ++i) expect_correct("real", random_scenario(random, 2, 6, kinds), {.log_stripes = i % 2});
  for (int i = 0; i < 12; ++i) expect_correct("real", random_scenario(random, 3, 3, kinds), {.log_stripes = i % 2});
}

}  // namespace

int main() {
  test_each_simpler_heap_is_caught();
  test_hints_are_right();
  test_split_loads();
  test_random_scenarios();
  return foveal_test::result();
}
