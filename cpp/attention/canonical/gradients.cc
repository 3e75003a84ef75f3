// Gradients: what the backward pass reads and fills beside a canonical problem.
#include <algorithm>
#include <string>

#include "attention/canonical/canonicalizer.h"
#include "attention/rejection.h"

namespace foveal {

void Canonicalizer::judge_gradients(CanonicalGradients& g) {
  if (p_.paged()) reject_value("block_table is given, expected none: keys in pages have no gradient");
  const DType accumulator = accumulator_of(p_.q.dtype);
  if (!p_.out.present()) reject_value("out is absent, expected the output of the forward pass");
  if (!p_.lse.present()) reject_value("lse is absent, expected that of the forward pass");
  rewrite_gradient("dout", g.dout, p_.out);
  rewrite_gradient("dq", g.dq, p_.q);
  rewrite_gradient("dk", g.dk, p_.k);
  rewrite_gradient("dv", g.dv, p_.v);
  require_no_overlap("dq", g.dq);
  require_no_overlap("dk", g.dk);
  require_no_overlap("dv", g.dv);
  if (g.dlse.present()) {
    check_gradient("dlse", g.dlse, accumulator);
    rewrite_lse("dlse", g.dlse);
    if (has_threshold(p_.normalizer) || is_pointwise(p_.normalizer))
      reject_value(std::string("dlse is given, expected none with normalizer='") + name_of(p_.normalizer) +
                   "', whose rows have no log-sum-exp");
  }
  if (g.dentropy.present()) {
    check_gradient("dentropy", g.dentropy, accumulator);
    rewrite_lse("dentropy", g.dentropy);
    if (!p_.entropy.present() || !p_.mass.present())
      reject_value("dentropy is given without entropy and mass, expected those of the forward pass");
  }
  if (g.dbias.present()) {
    check_gradient("dbias", g.dbias, accumulator);
    require_no_overlap("dbias", g.dbias);
    broadcast_to_scores("dbias", g.dbias);
  }
  const auto of_option = [&](const char* name, TensorView& gradient, const TensorView& option, const char* of) {
    check_gradient(name, gradient, accumulator);
    require_no_overlap(name, gradient);
    if (!option.present()) reject_value(std::string(name) + " is given without " + of);
  };
  if (g.dgate_tau.present()) {
    of_option("dgate_tau", g.dgate_tau, p_.gate_tau, "gate");
    broadcast_to_rows("dgate_tau", g.dgate_tau);
  }
  if (g.dgate_temperature.present()) {
    of_option("dgate_temperature", g.dgate_temperature, p_.gate_temperature, "gate");
    TensorView& view = g.dgate_temperature;
    if (view.rank > 1 || (view.rank == 1 && view.shape[0] != 1 && view.shape[0] != scores_[1]))
      reject_shape("dgate_temperature", view, "() or (Hq,) = " + text_of(scores_ + 1, 1));
    if (view.rank == 0 || view.shape[0] == 1) view.stride[0] = 0;
    view.rank = 1;
    view.shape[0] = scores_[1];
  }
  if (g.dadditive.present()) {
    of_option("du", g.dadditive, p_.additive, "u");
    rewrite_additive("du", g.dadditive);
  }
  if (g.dspan.present()) {
    of_option("dspan", g.dspan, p_.span, "span");
    broadcast_to_heads("dspan", g.dspan);
  }
  if (g.dsinks.present()) {
    check_gradient("dsinks", g.dsinks, accumulator);
    if (!p_.sinks.present()) reject_value("dsinks is given without sinks");
    if (g.dsinks.rank != 1 || g.dsinks.shape[0] != scores_[1])
      reject_shape("dsinks", g.dsinks, "(Hq,) = " + text_of(scores_ + 1, 1));
  }
}

void Canonicalizer::check_gradient(const char* name, const TensorView& view, DType dtype) const {
  if (!view.present()) reject_value(std::string(name) + " is absent");
  if (view.dtype != dtype) reject_dtype(name, view.dtype, name_of(dtype));
  check_memory(name, view);
}

void Canonicalizer::rewrite_gradient(const char* name, TensorView& view, const TensorView& like) const {
  check_gradient(name, view, p_.q.dtype);
  require_rank(name, view, rank_);
  const TensorView caller = view;
  view = canonical_view(view, layout_);
  if (!std::equal(like.shape, like.shape + 4, view.shape)) {
    reject_shape(name, caller, text_of(like.shape, 4) + " in the order (B, H, S, D)");
  }
}

}  // namespace foveal
