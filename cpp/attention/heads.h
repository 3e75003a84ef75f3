// A canonical problem, seen as the (batch, key/value head) pairs that kernels work on.
#pragma once

#include <cstdint>
#include <vector>

#include "foveal/attention.h"
#include "kernels/kernel_table.h"

namespace foveal {

// What the lengths and offsets of one batch element come to.
struct Sequence {
  int64_t q_len, kv_len, q_offset;
  int64_t q_begin, kv_begin;  // where its rows and keys begin on their axis: not 0 in packed problems alone
};

Sequence sequence_at(const CanonicalProblem& problem, int64_t b);

// Borrows from the problem, and the tasks borrow from it.
class Heads {
 public:
  explicit Heads(const CanonicalProblem& problem);

  int64_t group() const { return group_; }
  HeadTask task(int64_t b, int64_t kv_head) const;

 private:
  const CanonicalProblem& p_;
  int64_t group_ = 1;
  std::vector<double> slopes_, sinks_;                         // (B, Hq), (Hq,); empty: none
  std::vector<double> additive_;                               // (Hq, D)
  std::vector<double> gate_taus_, gate_temperatures_, spans_;  // (B, Hkv, rows), (Hq,), (B, Hq)
  std::vector<int32_t> pages_;                                 // (B, pages a sequence), paged keys
  std::vector<float> k_scales_, v_scales_;                     // (Hkv, B, pages a sequence), int8 keys
};

// The address of element `elements` of a view; null for an array without memory.
void* address_of(const TensorView& view, int64_t elements);

// Of one axis, whose extent and whose parts that sequences have are given.
template <class Visit>
void for_each_gap(const CanonicalProblem& p, int64_t extent, int64_t packed_extent, int64_t Sequence::* begin,
                  int64_t Sequence::* len, Visit visit) {
  const int64_t batch = p.q.shape[0];
  if (!p.packed()) {
    if (extent == 0) return;  // the batch may be larger than any loop over it
    for (int64_t b = 0; b < batch; ++b)
      if (const int64_t used = sequence_at(p, b).*len; used < extent) visit(b, used, extent);
    return;
  }
  const Sequence first = batch > 0 ? sequence_at(p, 0) : Sequence{},
                 last = batch > 0 ? sequence_at(p, batch - 1) : first;
  if (first.*begin > 0) visit(0, 0, first.*begin);
  if (last.*begin + last.*len < packed_extent) visit(0, last.*begin + last.*len, packed_extent);
}

// Calls visit(b, begin, end) for the ranges of rows, counted from the start of their axis, that no sequence has: those
// past a q_len, or outside the packed ones.
template <class Visit>
void for_each_padding(const CanonicalProblem& p, Visit visit) {
  for_each_gap(p, p.q.shape[2], p.packed_rows, &Sequence::q_begin, &Sequence::q_len, visit);
}

// The same of keys.
template <class Visit>
void for_each_key_padding(const CanonicalProblem& p, Visit visit) {
  for_each_gap(p, p.k.shape[2], p.packed_keys, &Sequence::kv_begin, &Sequence::kv_len, visit);
}

// Rows [begin, end) of one (batch, head) of a (B,H,S,D) array become 0; nothing for an absent one.
void fill_zero(const TensorView& view, int64_t b, int64_t h, int64_t begin, int64_t end);

}  // namespace foveal
