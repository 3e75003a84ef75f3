// The long form of the model check: every schedule of each of many random scenarios. Exit status 1 and a counterexample
// when one is found. Without options it is the same for everybody: the shapes of kLongForm.
//
//   heap_model_check [--cheap 1] [--jobs N] [--seed N] [--ids 4 | 8] [--threads N] [--operations N] [--scenarios N]
//                    [--seconds S] [--kinds push,pop,...] [--stripes LOG2] [--max-states N] [--scenario TEXT]
//                    [--without-hints 1] [--all 1]
//
// The shapes are dealt out over `jobs` processes; with --cheap, only those that .ci/run has time for. With --ids,
// --threads, --operations or --scenarios, scenarios of that one shape, until there were so many; --seconds ends each
// shape sooner. With --scenario, that one (see model/scenario.h for the notation); with --all, goes on after a
// counterexample and keeps the shortest; without hints, does not believe the header when it says what a thread forgets.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <string>

#include "model/explorer.h"

namespace {

using namespace model;
using Search = Explorer<foveal::BasicIndexedHeap<ModelAtomics, 1>>;

struct Shape {
  int ids, threads, operations;
  int64_t scenarios;
  bool cheap;
};

constexpr Shape kLongForm[] = {
    {4, 2, 6, 2000, true}, {4, 2, 8, 600, true},  {8, 2, 5, 400, true},  {8, 3, 3, 40, true},
    {4, 3, 4, 400, false}, {8, 2, 7, 100, false}, {8, 3, 3, 300, false},
};

class Arguments {
 public:
  Arguments(int argc, char** argv) {
    for (int i = 1; i < argc; i += 2) {
      if (values_.count(argv[i]) == 0 || i + 1 == argc) {
        std::fprintf(stderr, "heap_model_check: unknown option or no value: %s\n", argv[i]);
        std::exit(2);
      }
      values_[argv[i]] = argv[i + 1];
    }
  }
  const std::string& text(const char* name) const { return values_.at(name); }
  int64_t number(const char* name) const { return std::atoll(text(name).c_str()); }
  int64_t number(const char* name, int64_t otherwise) const { return number(name) > 0 ? number(name) : otherwise; }

 private:
  std::map<std::string, std::string> values_ = {
      {"--cheap", "0"},
      {"--jobs", "1"},
      {"--seconds", "0"},
      {"--seed", "1"},
      {"--ids", "0"},
      {"--threads", "0"},
      {"--operations", "0"},
      {"--scenarios", "0"},
      {"--stripes", "0"},
      {"--scenario", ""},
      {"--without-hints", "0"},
      {"--all", "0"},
      {"--max-states", "50000000"},
      {"--kinds", "push,update,upsert,remove,pop,peek,priority,pop_relaxed,pop_push"}};
};

std::vector<Kind> parse_kinds(const std::string& list) {
  std::vector<Kind> kinds;
  std::istringstream words(list);
  for (std::string word; std::getline(words, word, ',');) kinds.push_back(parse_operation(word + "(").kind);
  return kinds;
}

std::vector<Shape> shapes_of(const Arguments& arguments) {
  std::vector<Shape> shapes;
  if (arguments.number("--ids") + arguments.number("--threads") + arguments.number("--operations") +
          arguments.number("--scenarios") >
      0) {
    const int64_t endless = arguments.number("--seconds") > 0 ? std::numeric_limits<int64_t>::max() : 100;
    shapes.push_back(
        {static_cast<int>(arguments.number("--ids", 4)), static_cast<int>(arguments.number("--threads", 3)),
         static_cast<int>(arguments.number("--operations", 5)), arguments.number("--scenarios", endless), false});
    return shapes;
  }
  for (const Shape& shape : kLongForm) {
    if (shape.cheap || arguments.number("--cheap") == 0) shapes.push_back(shape);
  }
  return shapes;
}

struct Report {
  Scenario scenario;
  Outcome outcome;
};

bool is_fault(const Outcome& outcome) {
  return outcome.verdict != Verdict::kCorrect && outcome.verdict != Verdict::kTooLarge;
}

void print(const Options& options, const Report& report) {
  std::printf("%s: %s\n", to_string(report.scenario).c_str(), kVerdictName[static_cast<int>(report.outcome.verdict)]);
  Search(report.scenario, options).print(report.outcome.schedule);
}

int search_one(const Arguments& arguments, const Options& options) {
  Report report{parse(arguments.text("--scenario")), {}};
  report.outcome = Search(report.scenario, options).search();
  std::printf("%lld states, %lld ends, ", static_cast<long long>(report.outcome.states),
              static_cast<long long>(report.outcome.ends));
  if (!is_fault(report.outcome)) {
    return std::printf("%s\n", kVerdictName[static_cast<int>(report.outcome.verdict)]), 0;
  }
  print(options, report);
  return 1;
}

// Returns whether a counterexample was found.
bool search_shape(const Shape& shape, const Arguments& arguments, const Options& options) {
  const std::vector<Kind> kinds = parse_kinds(arguments.text("--kinds"));
  std::mt19937 random(static_cast<unsigned>(arguments.number("--seed")));
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  const auto seconds = static_cast<double>(arguments.number("--seconds"));
  int64_t scenarios = 0, states = 0, too_large = 0, faults = 0;
  Report shortest;
  while (scenarios < shape.scenarios && (seconds == 0 || elapsed() < seconds) &&
         (faults == 0 || arguments.number("--all") != 0)) {
    Report report{random_scenario(random, shape.ids, shape.threads, shape.operations, kinds), {}};
    report.outcome = Search(report.scenario, options).search();
    ++scenarios;
    states += report.outcome.states;
    too_large += report.outcome.verdict == Verdict::kTooLarge;
    if (!is_fault(report.outcome)) continue;
    if (faults++ == 0 || report.outcome.schedule.size() < shortest.outcome.schedule.size()) shortest = report;
  }
  std::printf(
      "%d ids, %d operations of %d threads: %lld scenarios, %lld states, %lld cut off at --max-states, "
      "%lld counterexamples, %.0f s\n",
      shape.ids, shape.operations, shape.threads, static_cast<long long>(scenarios), static_cast<long long>(states),
      static_cast<long long>(too_large), static_cast<long long>(faults), elapsed());
  if (faults > 0) print(options, shortest);
  std::fflush(stdout);
  return faults > 0;
}

// A process of its own for each shape, `jobs` at a time: the search keeps its state in globals.
int search_all(const std::vector<Shape>& shapes, const Arguments& arguments, const Options& options) {
  int failed = 0;
  int64_t running = 0;
  const auto wait_for_one = [&] {
    int status = 0;
    wait(&status);
    failed += status != 0;
    --running;
  };
  for (const Shape& shape : shapes) {
    if (running == arguments.number("--jobs", 1)) wait_for_one();
    if (failed > 0) break;
    if (fork() == 0) std::exit(search_shape(shape, arguments, options) ? 1 : 0);
    ++running;
  }
  while (running > 0) wait_for_one();
  return failed > 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  const Options options{.log_stripes = static_cast<int>(arguments.number("--stripes")),
                        .max_states = arguments.number("--max-states")};
  ModelAtomics::forgetting = arguments.number("--without-hints") == 0;
  if (!arguments.text("--scenario").empty()) return search_one(arguments, options);
  return search_all(shapes_of(arguments), arguments, options);
}
