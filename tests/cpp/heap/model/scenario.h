// What the model checker runs: initial contents of a tiny heap, and a program of a few operations for each thread.
//
// Written as text, the initial priority of each id first ("-" is absent), then the threads:
//   1 3 2 - | pop | pop push(0,1) | peek peek
// With fan-out 2, four ids have one level of nodes below the root, eight have two: two that can be dirty.
#pragma once

#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "operation.h"

namespace model {

constexpr int kMaxIds = 8;
constexpr int kMaxThreads = 4;
using TinyContents = Contents<kMaxIds>;  // kNone at and above the capacity

struct Scenario {
  int capacity = 0;
  TinyContents initial = nothing<kMaxIds>();
  std::vector<std::vector<Operation>> threads;
};

inline std::string to_string(const Scenario& scenario) {
  std::string text;
  for (int id = 0; id < scenario.capacity; ++id) {
    const uint8_t priority = scenario.initial[id];
    (text += priority == kNone ? "-" : std::to_string(priority)) += ' ';
  }
  for (const auto& program : scenario.threads) {
    text += '|';
    for (const Operation& op : program) (text += ' ') += to_string(op);
    text += ' ';
  }
  text.pop_back();
  return text;
}

inline Scenario parse(const std::string& text) {
  Scenario scenario;
  std::istringstream words(text);
  std::string word;
  while (words >> word) {
    if (word == "|") {
      scenario.threads.emplace_back();
    } else if (!scenario.threads.empty()) {
      scenario.threads.back().push_back(parse_operation(word));
    } else {
      if (scenario.capacity == kMaxIds) throw std::invalid_argument("scenario: more than 8 ids in " + text);
      scenario.initial[scenario.capacity++] = word == "-" ? kNone : static_cast<uint8_t>(std::stoi(word));
    }
  }
  return scenario;
}

// Priorities 1 to 4, each id present with probability 1/2; the operations of `kinds` dealt out over the threads.
inline Scenario random_scenario(std::mt19937& random, int capacity, int threads, int operations,
                                const std::vector<Kind>& kinds) {
  Scenario scenario;
  scenario.capacity = capacity;
  const auto below = [&random](unsigned n) { return static_cast<uint8_t>(random() % n); };
  for (int id = 0; id < capacity; ++id) scenario.initial[id] = below(2) != 0 ? 1 + below(4) : kNone;
  scenario.threads.resize(threads);
  for (int i = 0; i < operations; ++i) {
    Operation op{kinds[random() % kinds.size()]};
    if (takes_id(op.kind)) op.id = below(capacity);
    if (takes_priority(op.kind)) op.priority = 1 + below(4);
    scenario.threads[i < threads ? i : below(threads)].push_back(op);
  }
  return scenario;
}

}  // namespace model
