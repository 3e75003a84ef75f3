// The operations of a heap of a few ids, as the checkers see them: what each does to a sequential heap, and the same on
// the real one. Priorities are small whole numbers.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "foveal/indexed_heap.h"

namespace model {

constexpr uint8_t kNone = 255;  // no id, or no priority

enum class Kind : uint8_t {
  kPush,
  kUpdate,
  kUpsert,
  kRemove,
  kPop,
  kPeek,
  kPriority,
  kPopRelaxed,
  kPopPush,
  kPopPushAtomic
};
constexpr const char* kKindName[] = {"push", "update",   "upsert",      "remove",   "pop",
                                     "peek", "priority", "pop_relaxed", "pop_push", "pop_push_atomic"};
constexpr int kKinds = 10;

constexpr bool takes_id(Kind kind) {
  return kind == Kind::kPush || kind == Kind::kUpdate || kind == Kind::kUpsert || kind == Kind::kRemove ||
         kind == Kind::kPriority;
}
constexpr bool takes_priority(Kind kind) {
  return kind == Kind::kPush || kind == Kind::kUpdate || kind == Kind::kUpsert || kind == Kind::kPopPush ||
         kind == Kind::kPopPushAtomic;
}

struct Operation {
  Kind kind = Kind::kPop;
  uint8_t id = 0;
  uint8_t priority = 0;
};

// pop, peek and their relatives: (id, priority); push, update, upsert: (was the id present, 0); remove, priority: (0,
// priority).
struct Result {
  uint8_t id = 0;
  uint8_t priority = 0;

  auto operator<=>(const Result&) const = default;
};

template <size_t kCapacity>
using Contents = std::array<uint8_t, kCapacity>;  // priority of each id, or kNone

template <size_t kCapacity>
constexpr Contents<kCapacity> nothing() {
  Contents<kCapacity> contents;
  contents.fill(kNone);
  return contents;
}

// What a sequential heap does: calls emit(contents afterwards, result) for each outcome that is allowed.
template <size_t kCapacity, class Emit>
void apply_sequentially(const Contents<kCapacity>& before, const Operation& op, Emit emit) {
  Contents<kCapacity> after = before;
  int first = -1;
  for (size_t id = 0; id < kCapacity; ++id) {
    if (before[id] != kNone && (first < 0 || before[id] < before[first])) first = static_cast<int>(id);
  }
  const Result first_result = first < 0 ? Result{kNone, kNone} : Result{static_cast<uint8_t>(first), before[first]};
  const bool present = before[op.id] != kNone;
  switch (op.kind) {
    case Kind::kPush:
      if (!present) after[op.id] = op.priority;
      return emit(after, Result{present, 0});
    case Kind::kUpdate:
      if (present) after[op.id] = op.priority;
      return emit(after, Result{present, 0});
    case Kind::kUpsert:
      after[op.id] = op.priority;
      return emit(after, Result{present, 0});
    case Kind::kRemove:
      after[op.id] = kNone;
      return emit(after, Result{0, before[op.id]});
    case Kind::kPriority:
      return emit(after, Result{0, before[op.id]});
    case Kind::kPeek:
      return emit(after, first_result);
    case Kind::kPop:
    case Kind::kPopPush:  // its first half
      if (first >= 0) after[first] = kNone;
      return emit(after, first_result);
    case Kind::kPopPushAtomic:
      if (first >= 0) after[first] = op.priority;
      return emit(after, first_result);
    case Kind::kPopRelaxed:  // any element; none only from an empty heap
      if (first < 0) return emit(after, first_result);
      for (size_t id = 0; id < kCapacity; ++id) {
        if (before[id] == kNone) continue;
        after = before;
        after[id] = kNone;
        emit(after, Result{static_cast<uint8_t>(id), before[id]});
      }
      return;
  }
}

// What the real heap does.
template <class Heap>
Result run(Heap& heap, const Operation& op) {
  const double priority = op.priority;
  const auto of_entry = [](const std::optional<foveal::HeapEntry>& entry) {
    if (!entry) return Result{kNone, kNone};
    return Result{static_cast<uint8_t>(entry->id), static_cast<uint8_t>(entry->priority)};
  };
  const auto of_priority = [](std::optional<double> p) { return Result{0, p ? static_cast<uint8_t>(*p) : kNone}; };
  switch (op.kind) {
    case Kind::kPush:
      return {!heap.push(op.id, priority), 0};
    case Kind::kUpdate:
      return {heap.update(op.id, priority), 0};
    case Kind::kUpsert:
      return {heap.upsert(op.id, priority), 0};
    case Kind::kRemove:
      return of_priority(heap.remove(op.id));
    case Kind::kPriority:
      return of_priority(heap.priority(op.id));
    case Kind::kPop:
      return of_entry(heap.pop());
    case Kind::kPeek:
      return of_entry(heap.peek());
    case Kind::kPopPush:
    case Kind::kPopPushAtomic:
      return of_entry(heap.pop_push(priority));
    case Kind::kPopRelaxed: {
      uint64_t state = 0;
      return of_entry(heap.pop_relaxed(state));
    }
  }
  return {};
}

inline std::string to_string(const Operation& op) {
  std::string text = kKindName[static_cast<int>(op.kind)];
  if (takes_id(op.kind) && takes_priority(op.kind))
    return text + "(" + std::to_string(op.id) + "," + std::to_string(op.priority) + ")";
  if (takes_id(op.kind)) return text + "(" + std::to_string(op.id) + ")";
  if (takes_priority(op.kind)) return text + "(" + std::to_string(op.priority) + ")";
  return text;
}

inline Operation parse_operation(const std::string& word) {
  const size_t open = word.find('(');
  for (int kind = 0; kind < kKinds; ++kind) {
    if (word.substr(0, open) != kKindName[kind]) continue;
    Operation op{static_cast<Kind>(kind)};
    if (open == std::string::npos) return op;
    const size_t comma = word.find(',');
    const auto number = [&word](size_t at) { return static_cast<uint8_t>(std::atoi(word.c_str() + at)); };
    if (takes_id(op.kind)) op.id = number(open + 1);
    if (takes_priority(op.kind)) op.priority = number((comma == std::string::npos ? open : comma) + 1);
    return op;
  }
  throw std::invalid_argument("scenario: unknown operation " + word);
}

}  // namespace model
