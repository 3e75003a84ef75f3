// The long form of the model check: every schedule of each of many random scenarios. Exit status 1 and a counterexample
// when one is found. Without options it is the same for everybody: the scenarios of kLongForm.
//
//   heap_model_check [--variant NAME] [--seed N] [--threads N] [--operations N] [--scenarios N] [--seconds S]
//                    [--kinds push,pop,...] [--stripes LOG2] [--max-states N] [--scenario TEXT] [--without-hints 1]
//                    [--all 1]
//
// With --threads, --operations, --scenarios or --seconds, scenarios of that one shape, until there were so many or the
// time is up. With --scenario, that one (see model/scenario.h for the notation); with --all, goes on after a
// counterexample and keeps the shortest; without hints, does not believe the header when it says what a thread forgets.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <string>

#include "model/variants.h"

namespace {

using namespace model;

std::vector<Kind> parse_kinds(const std::string& list) {
  std::vector<Kind> kinds;
  std::istringstream words(list);
  for (std::string word; std::getline(words, word, ',');) kinds.push_back(parse_operation(word + "(").kind);
  return kinds;
}

struct Report {
  Scenario scenario;
  Outcome outcome;
};

struct Shape {
  int threads, operations;
  int64_t scenarios;
};

constexpr Shape kLongForm[] = {{2, 6, 2000}, {2, 8, 600}, {3, 4, 400}};

int print(const Variant& variant, const Options& options, const Report& report) {
  std::printf("%s: %s\n", to_string(report.scenario).c_str(), kVerdictName[static_cast<int>(report.outcome.verdict)]);
  variant.print(report.scenario, options, report.outcome.schedule);
  return 1;
}

bool is_fault(const Outcome& outcome) {
  return outcome.verdict != Verdict::kCorrect && outcome.verdict != Verdict::kTooLarge;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> arguments = {
      {"--variant", "real"},
      {"--seconds", "0"},
      {"--seed", "1"},
      {"--threads", "0"},
      {"--operations", "0"},
      {"--scenarios", "0"},
      {"--stripes", "0"},
      {"--scenario", ""},
      {"--without-hints", "0"},
      {"--all", "0"},
      {"--max-states", "50000000"},
      {"--kinds", "push,update,upsert,remove,pop,peek,priority,pop_relaxed,pop_push"}};
  for (int i = 1; i < argc; i += 2) {
    if (arguments.count(argv[i]) == 0 || i + 1 == argc) {
      std::fprintf(stderr, "heap_model_check: unknown option or no value: %s\n", argv[i]);
      return 2;
    }
    arguments[argv[i]] = argv[i + 1];
  }
  const auto number = [&](const char* name) { return std::atoll(arguments[name].c_str()); };
  const Variant* variant = find_variant(arguments["--variant"].c_str());
  if (variant == nullptr) {
    std::fprintf(stderr, "heap_model_check: unknown variant %s\n", arguments["--variant"].c_str());
    return 2;
  }
  const Options options{.log_stripes = static_cast<int>(number("--stripes")), .max_states = number("--max-states")};
  ModelAtomics::forgetting = number("--without-hints") == 0;

  if (!arguments["--scenario"].empty()) {
    Report report{parse(arguments["--scenario"]), {}};
    report.outcome = variant->search(report.scenario, options);
    std::printf("%lld states, %lld ends, ", static_cast<long long>(report.outcome.states),
                static_cast<long long>(report.outcome.ends));
    if (is_fault(report.outcome)) return print(*variant, options, report);
    std::printf("%s\n", kVerdictName[static_cast<int>(report.outcome.verdict)]);
    return 0;
  }

  std::vector<Shape> shapes(std::begin(kLongForm), std::end(kLongForm));
  if (number("--threads") + number("--operations") + number("--scenarios") + number("--seconds") > 0) {
    const auto or_else = [&](const char* name, int64_t value) { return number(name) > 0 ? number(name) : value; };
    const int64_t endless = number("--seconds") > 0 ? std::numeric_limits<int64_t>::max() : 100;
    shapes = {{static_cast<int>(or_else("--threads", 3)), static_cast<int>(or_else("--operations", 5)),
               or_else("--scenarios", endless)}};
  }
  const std::vector<Kind> kinds = parse_kinds(arguments["--kinds"]);
  std::mt19937 random(static_cast<unsigned>(number("--seed")));
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  const auto in_time = [&] { return number("--seconds") == 0 || elapsed() < static_cast<double>(number("--seconds")); };
  int64_t faults = 0;
  Report shortest;
  for (const Shape& shape : shapes) {
    int64_t scenarios = 0, states = 0, too_large = 0;
    while (scenarios < shape.scenarios && in_time() && (faults == 0 || number("--all") != 0)) {
      Report report{random_scenario(random, shape.threads, shape.operations, kinds), {}};
      report.outcome = variant->search(report.scenario, options);
      ++scenarios;
      states += report.outcome.states;
      too_large += report.outcome.verdict == Verdict::kTooLarge;
      if (!is_fault(report.outcome)) continue;
      if (faults++ == 0 || report.outcome.schedule.size() < shortest.outcome.schedule.size()) shortest = report;
    }
    std::printf(
        "%s, %d operations of %d threads: %lld scenarios, %lld states, %lld cut off at --max-states, "
        "%lld counterexamples, %.0f s\n",
        variant->name, shape.operations, shape.threads, static_cast<long long>(scenarios),
        static_cast<long long>(states), static_cast<long long>(too_large), static_cast<long long>(faults), elapsed());
    std::fflush(stdout);
  }
  return faults > 0 ? print(*variant, options, shortest) : 0;
}
