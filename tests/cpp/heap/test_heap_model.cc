// The short form of the model check (the long one: heap_model_check.cc): every schedule of some scenarios on the real
// header. The known ones come first: each shows the fault of one of the heaps in mutants.py. Ends at the first
// counterexample.
#include <cstdlib>
#include <string>

#include "check.h"
#include "model/explorer.h"

namespace {

using namespace model;

template <class Atomics>
using Search = Explorer<foveal::BasicIndexedHeap<Atomics, 1>>;

Outcome search(const Scenario& scenario, Options options = {}) {
  const Outcome outcome = Search<ModelAtomics>(scenario, options).search();
  std::printf("%-64s %9lld states  %s\n", to_string(scenario).c_str(), static_cast<long long>(outcome.states),
              kVerdictName[static_cast<int>(outcome.verdict)]);
  std::fflush(stdout);
  return outcome;
}

void expect_correct(const Scenario& scenario, Options options = {}) {
  const Outcome outcome = search(scenario, options);
  FOVEAL_CHECK(outcome.verdict == Verdict::kCorrect);
  if (outcome.verdict == Verdict::kCorrect) return;
  Search<ModelAtomics>(scenario, options).print(outcome.schedule);
  std::fflush(stdout);
  std::exit(foveal_test::result());
}

// On eight ids, two levels of nodes can be dirty. The last two take some seconds.
constexpr const char* kKnown[] = {
    "- - - - | push(0,2) | push(1,4) pop",
    "- - - 2 | pop | peek",
    "- - - 2 | pop | push(0,3) | push(3,2)",
    "- - - 2 | pop | push(0,3) push(3,2)",
    "3 1 - - | push(3,4) | push(2,1)",
    "4 - - 1 | pop | push(3,1) | peek",
    "- - - 4 | push(1,3) priority(3) | pop",
    "3 1 1 2 | update(2,1) | upsert(1,2) | update(2,2)",
    "- 2 - - | pop | push(0,2) priority(1)",
    "- - - 4 | push(1,3) push(3,1) | pop",
    "3 - - 2 | remove(0) | push(1,1) peek",
    "- - - - | push(0,1) | update(0,2) peek",
    "- - - - | push(0,2) priority(0) peek | remove(0) push(0,1)",
    "- - - 4 | pop | pop | push(1,3) priority(3) peek",
    "- - - - - - - - | push(0,2) | push(1,3) peek",
    "- - - 2 | pop push(0,1) push(3,2) | priority(3) peek",
    "- 4 - 3 | push(0,1) peek | update(1,3) | update(1,2)",
    "1 3 2 - | pop | pop push(0,1) | peek peek",
    "3 - - - | pop | push(1,2) push(3,1) priority(0) | remove(1) remove(3)",
};

void test_known_scenarios() {
  for (const char* text : kKnown) expect_correct(parse(text));
}

// One claim too many: the header does not say that pop_push is atomic, and the judge can tell.
void test_pop_push_is_two_operations() {
  const Outcome outcome = search(parse("3 - - - | pop_push_atomic(1) | push(1,2) peek"));
  FOVEAL_CHECK(outcome.verdict == Verdict::kNotLinearizable);
  expect_correct(parse("3 - - - | pop_push(1) | push(1,2) peek"));
}

// The header tells the checker what a thread forgets. Without being told, it must find the same answers.
void test_hints_are_right() {
  for (const char* text : {"- - - 2 | pop | push(0,3) push(3,2)", "3 2 - - | push(2,1) | push(3,1) peek",
                           "4 - - 1 | pop | push(3,1) | peek", "2 - - 1 | remove(3) | update(0,1) | priority(3)",
                           "1 - 2 - | pop_push(3) | pop_relaxed"}) {
    const Scenario scenario = parse(text);
    const Options options{.keep_answers = true};
    const Outcome with = search(scenario, options);
    ModelAtomics::forgetting = false;
    const Outcome without = search(scenario, options);
    ModelAtomics::forgetting = true;
    FOVEAL_CHECK(with.verdict == Verdict::kCorrect && without.verdict == Verdict::kCorrect);
    FOVEAL_CHECK(with.answers == without.answers && with.answers.size() > 1);
  }
}

void test_split_loads() {
  for (const char* text : {"- - - - | push(0,2) | push(1,4) pop", "- - - 2 | pop | push(0,3) push(3,2)",
                           "- - - 4 | push(1,3) priority(3) | pop"}) {
    const Outcome outcome = Search<SplitLoadAtomics>(parse(text), {}).search();
    FOVEAL_CHECK(outcome.verdict == Verdict::kCorrect);
  }
}

void test_random_scenarios() {
  const std::vector<Kind> kinds = {Kind::kPush, Kind::kUpdate,   Kind::kUpsert,     Kind::kRemove, Kind::kPop,
                                   Kind::kPeek, Kind::kPriority, Kind::kPopRelaxed, Kind::kPopPush};
  std::mt19937 random(20);
  for (int i = 0; i < 120; ++i) expect_correct(random_scenario(random, 4, 2, 6, kinds), {.log_stripes = i % 2});
  for (int i = 0; i < 12; ++i) expect_correct(random_scenario(random, 4, 3, 3, kinds), {.log_stripes = i % 2});
  for (int i = 0; i < 30; ++i) expect_correct(random_scenario(random, 8, 2, 4, kinds), {.log_stripes = i % 2});
  for (int i = 0; i < 4; ++i) expect_correct(random_scenario(random, 8, 3, 3, kinds), {.log_stripes = i % 2});
}

}  // namespace

int main() {
  test_known_scenarios();
  test_pop_push_is_two_operations();
  test_hints_are_right();
  test_split_loads();
  test_random_scenarios();
  return foveal_test::result();
}
