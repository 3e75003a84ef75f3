// How a row's scores become weights: the dispatch over all normalisers (foveal/normalizer.h). There are two kinds.
//
// A normaliser of one pass weighs a block of scores as soon as it is there. It is a struct of static functions:
//   begin         the state of a row before its first key
//   step          a block of scores -> weights, and what the sums so far are worth from now on
//   scale         what the sums of weighted values are multiplied by at the end
//   final_weight  a score -> the row's weight, once its state is final (weights that are returned)
//   join          the states of a row over different keys -> one, and what the sums of each are worth
// The state of a row is kRowMembers numbers (kernels/kernel_table.h), which lie member by member in tiles, in partial
// results and in what the host reads: a statistic of a row is one more member.
//
// A normaliser with a threshold needs all scores of a row before it knows a weight (threshold.inl.h):
//   kReach        a key this far below the largest score has weight 0, in units of the formula's argument
//   argument      a score, less the row's largest -> the formula's argument
//   weight        what is above the threshold -> the weight
//   next          a better threshold from the sums over what is above this one
//
// Both have the same weights again for the backward pass, where the terms of a row (RowTerms) are known:
//   gradient_weight   a score -> the weight
//   score_gradient    the gradient of a weight -> that of the score
//
// Normalised sigmoid is softmax of log sigmoid(score): a policy of the scores (score_policy.inl.h), no struct here.
#pragma once

#include "kernels/entmax15.inl.h"
#include "kernels/kernel_table.h"
#include "kernels/relu.inl.h"
#include "kernels/row_state.inl.h"
#include "kernels/sigmoid.inl.h"
#include "kernels/softmax.inl.h"
#include "kernels/sparsemax.inl.h"
#include "simd/vectors.h"

namespace foveal {
namespace {

// Calls visit(N{}) with the one-pass normaliser of a head. It is chosen anew for every block of keys, which costs
// nothing beside the block's products, and lets all normalisers share their code. A row with a threshold begins as one
// of softmax.
template <class Visit>
FOVEAL_INLINE auto with_normalizer(const HeadTask& h, const Visit& visit) {
  if (h.normalizer == Normalizer::kSigmoid) return visit(Sigmoid{});
  if (h.normalizer == Normalizer::kRelu) return visit(Relu{});
  return visit(Softmax{});
}

template <class Visit>
FOVEAL_INLINE auto with_threshold(const HeadTask& h, const Visit& visit) {
  if (h.normalizer == Normalizer::kSparsemax) return visit(Sparsemax{});
  return visit(Entmax15{});
}

template <class Visit>
FOVEAL_INLINE auto with_gradient(const HeadTask& h, const Visit& visit) {
  if (has_threshold(h.normalizer)) return with_threshold(h, visit);
  return with_normalizer(h, visit);
}

}  // namespace
}  // namespace foveal
