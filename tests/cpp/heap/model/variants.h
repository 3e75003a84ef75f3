// The heap as it is, and the ten simpler heaps that are wrong: each leaves out one rule of HeapRules (or, the ninth,
// claims more than the header does). The checker must find fault with every one of them.
#pragma once

#include <array>
#include <cstring>

#include "explorer.h"

namespace model {

struct Variant {
  int number;  // 0: the real one
  const char* name;
  Outcome (*search)(const Scenario&, const Options&);
  void (*print)(const Scenario&, const Options&, const std::vector<uint8_t>& schedule);
};

template <foveal::HeapRules kRules, class Atomics = ModelAtomics>
constexpr Variant variant(int number, const char* name) {
  using Search = Explorer<foveal::BasicIndexedHeap<Atomics, 1, kRules>>;
  return {number, name,
          [](const Scenario& scenario, const Options& options) { return Search(scenario, options).search(); },
          [](const Scenario& scenario, const Options& options, const std::vector<uint8_t>& schedule) {
            Search(scenario, options).print(schedule);
          }};
}

using OnEqual = foveal::HeapRules::OnEqual;

inline constexpr std::array kVariants = {
    variant<foveal::HeapRules{}>(0, "real"),
    variant<foveal::HeapRules{}, SplitLoadAtomics>(0, "real-with-split-loads"),
    variant<foveal::HeapRules{.node_dirty = false}>(1, "no-dirty-nodes"),
    variant<foveal::HeapRules{.help_to_root = false}>(2, "help-stops-early"),
    variant<foveal::HeapRules{.on_equal = OnEqual::kStop}>(3, "no-bump"),
    variant<foveal::HeapRules{.node_dirty = false, .on_equal = OnEqual::kReadOn}>(3, "read-only-check"),
    variant<foveal::HeapRules{.tries = 2}>(4, "two-tries"),
    variant<foveal::HeapRules{.helper_bumps = false}>(5, "helper-without-bump"),
    variant<foveal::HeapRules{.reread_root = false}>(6, "pop-without-reread"),
    variant<foveal::HeapRules{.claim = false}>(7, "no-claim"),
    variant<foveal::HeapRules{.peek_settles = false}>(8, "peek-without-settling"),
    variant<foveal::HeapRules{}>(9, "pop-push-taken-as-atomic"),
    variant<foveal::HeapRules{.versions = false}>(10, "frozen-versions"),
};

inline const Variant* find_variant(const char* name) {
  for (const Variant& v : kVariants) {
    if (std::strcmp(v.name, name) == 0) return &v;
  }
  return nullptr;
}

}  // namespace model
