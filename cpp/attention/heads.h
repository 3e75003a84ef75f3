// A canonical problem, seen as the (batch, key/value head) pairs that kernels work on.
#pragma once

#include <cstdint>
#include <vector>

#include "foveal/attention.h"
#include "isa/kernel_table.h"

namespace foveal {

// What the lengths and offsets of one batch element come to.
struct Sequence {
  int64_t q_len, kv_len, q_offset;
};

Sequence sequence_at(const AttentionProblem& problem, int64_t b);

// Borrows from the problem, and the tasks borrow from it.
class Heads {
 public:
  explicit Heads(const AttentionProblem& problem);

  int64_t group() const { return group_; }
  HeadTask task(int64_t b, int64_t kv_head) const;

 private:
  const AttentionProblem& p_;
  int64_t group_ = 1;
  std::vector<double> slopes_, sinks_;  // (B, Hq), (Hq,); empty: none
};

// The address of element `elements` of a view; null for an array without memory.
void* address_of(const TensorView& view, int64_t elements);

// Rows [begin, end) of one (batch, head) of a (B,H,S,D) array become 0; nothing for an absent one.
void fill_zero(const TensorView& view, int64_t b, int64_t h, int64_t begin, int64_t end);

}  // namespace foveal
