// What the scores and the weights go through: masks, biases, slopes, sinks, and numbers.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numbers>
#include <string>

#include "attention/canonical/canonicalizer.h"
#include "attention/element.h"
#include "attention/rejection.h"

namespace foveal {
namespace {

constexpr int64_t kWindowBeyondAll = int64_t{1} << 62;  // > |q_offset| + Sq + Skv, so as good as unlimited

}  // namespace

void Canonicalizer::broadcast_to_scores(const char* name, TensorView& view) const {
  if (!view.present()) return;
  const bool keys_by_batch = view.rank == 2 && view.shape[0] == scores_[0] && view.shape[1] == scores_[3];
  const auto expected = [&] {
    return ", expected an array that broadcasts to (B, Hq, Sq, Skv) = " + text_of(scores_, 4) +
           (keys_by_batch ? std::string("; one of (B, Skv) is ") + name + "[:, None, None, :]" : "");
  };
  if (view.rank > 4) reject_value(name + (" has " + dimensions(view.rank)) + expected());
  TensorView canonical = view;
  canonical.rank = 4;
  for (int axis = 0; axis < 4; ++axis) {
    const int position = axis - (4 - view.rank);
    const int64_t extent = position < 0 ? 1 : view.shape[position];
    if (extent != 1 && extent != scores_[axis]) reject_value(extent_found(name, position, extent) + expected());
    canonical.shape[axis] = scores_[axis];
    canonical.stride[axis] = extent == 1 ? 0 : view.stride[position];
  }
  view = canonical;
}

void Canonicalizer::rewrite_alibi_slopes() {
  TensorView& slopes = p_.alibi_slopes;
  if (!slopes.present()) return;
  const bool per_head = slopes.rank == 1 && slopes.shape[0] == scores_[1];
  const bool per_batch_and_head = slopes.rank == 2 && slopes.shape[0] == scores_[0] && slopes.shape[1] == scores_[1];
  if (!per_head && !per_batch_and_head) {
    reject_shape("alibi_slopes", slopes, "(Hq,) = " + text_of(scores_ + 1, 1) + " or (B, Hq) = " + text_of(scores_, 2));
  }
  if (per_head) {
    slopes.stride[1] = slopes.stride[0];
    slopes.stride[0] = 0;
  }
  slopes.rank = 2;
  slopes.shape[0] = scores_[0];
  slopes.shape[1] = scores_[1];
}

// To (B,Hq,Sq) of the caller's q; packed: to (Hq,Tq).
void Canonicalizer::broadcast_to_rows(const char* name, TensorView& view) const {
  const int most = p_.packed() ? 2 : 3;
  TensorView canonical = view;
  canonical.rank = 3;
  bool fits = view.rank <= most;
  for (int axis = 0; axis < 3 && fits; ++axis) {
    const int position = axis - (3 - view.rank);
    const int64_t extent = position < 0 ? 1 : view.shape[position];
    fits = extent == 1 || extent == rows_[axis];
    canonical.shape[axis] = rows_[axis];
    canonical.stride[axis] = extent == 1 ? 0 : view.stride[position];
  }
  if (!fits)
    reject_shape(name, view,
                 "an array that broadcasts to " +
                     (p_.packed() ? "(Hq, Tq) = " + text_of(rows_ + 1, 2) : "(B, Hq, Sq) = " + text_of(rows_, 3)));
  view = canonical;
}

// To (B,Hq).
void Canonicalizer::broadcast_to_heads(const char* name, TensorView& view) const {
  TensorView canonical = view;
  canonical.rank = 2;
  bool fits = view.rank <= 2;
  for (int axis = 0; axis < 2 && fits; ++axis) {
    const int position = axis - (2 - view.rank);
    const int64_t extent = position < 0 ? 1 : view.shape[position];
    fits = extent == 1 || extent == scores_[axis];
    canonical.shape[axis] = scores_[axis];
    canonical.stride[axis] = extent == 1 ? 0 : view.stride[position];
  }
  if (!fits) reject_shape(name, view, "(Hq,) = " + text_of(scores_ + 1, 1) + " or (B, Hq) = " + text_of(scores_, 2));
  view = canonical;
}

// Of u, and of its gradient.
void Canonicalizer::rewrite_additive(const char* name, TensorView& view) const {
  const int64_t head_dim = p_.q.shape[kDim], whole[] = {scores_[1], head_dim};
  const bool shared = view.rank == 1 && view.shape[0] == head_dim;
  if (!shared && !(view.rank == 2 && view.shape[0] == scores_[1] && view.shape[1] == head_dim))
    reject_shape(name, view, "(A,) = " + text_of(whole + 1, 1) + " or (Hq, A) = " + text_of(whole, 2));
  if (!shared) return;
  view.rank = 2;
  view.shape[1] = view.shape[0];
  view.stride[1] = view.stride[0];
  view.shape[0] = scores_[1];
  view.stride[0] = 0;
}

void Canonicalizer::rewrite_gate() {
  TensorView &tau = p_.gate_tau, &temperature = p_.gate_temperature;
  if (tau.present() != temperature.present())
    reject_value(std::string(tau.present() ? "gate[1]" : "gate[0]") + " is absent, expected both of (tau, T)");
  if (!tau.present()) return;
  broadcast_to_rows("gate[0]", tau);
  if (temperature.rank > 1 ||
      (temperature.rank == 1 && temperature.shape[0] != 1 && temperature.shape[0] != scores_[1]))
    reject_shape("gate[1]", temperature, "() or (Hq,) = " + text_of(scores_ + 1, 1));
  if (temperature.rank == 0 || temperature.shape[0] == 1) temperature.stride[0] = 0;
  temperature.rank = 1;
  temperature.shape[0] = scores_[1];
  if (temperature.device.type != DeviceType::kCpu) return;
  for (int64_t h = 0; h < (temperature.stride[0] == 0 ? std::min<int64_t>(scores_[1], 1) : scores_[1]); ++h) {
    const double value = load_element(temperature, h * temperature.stride[0]);
    if (!(value > 0.0 && std::isfinite(value)))
      reject_value("gate[1] has the element " + text_of(value) + ", expected finite numbers above 0");
  }
}

void Canonicalizer::rewrite_span() {
  if (!p_.span.present()) return;
  broadcast_to_heads("span[0]", p_.span);
  if (!(p_.span_ramp > 0.0 && std::isfinite(p_.span_ramp)))
    reject_value("span[1] is " + text_of(p_.span_ramp) + ", expected a finite number above 0");
  // 1 / ramp is finite in the accumulator type.
  p_.span_ramp = std::max(p_.span_ramp, p_.q.dtype == DType::kFloat64 ? DBL_MIN : double{FLT_MIN});
}

void Canonicalizer::check_normalizer() const {
  if (static_cast<int>(p_.normalizer) >= kNormalizers)
    reject_value("normalizer is " + std::to_string(static_cast<int>(p_.normalizer)) + ", expected a Normalizer");
  if (p_.sinks.present() && p_.normalizer != Normalizer::kSoftmax)
    throw Rejection{ErrorKind::kNotImplemented,
                    std::string("sinks with normalizer='") + name_of(p_.normalizer) + "' are not implemented"};
}

void Canonicalizer::check_sinks() const {
  if (!p_.sinks.present() || (p_.sinks.rank == 1 && p_.sinks.shape[0] == scores_[1])) return;
  reject_shape("sinks", p_.sinks, "(Hq,) = " + text_of(scores_ + 1, 1));
}

void Canonicalizer::rewrite_numbers() {
  const auto rewrite_window = [](const char* name, int64_t& width) {
    if (width < 0 && width != kUnlimited)
      reject_value(name + (" is " + std::to_string(width)) + ", expected at least 0");
    if (width >= kWindowBeyondAll) width = kUnlimited;
  };
  rewrite_window("window[0]", p_.window_left);
  rewrite_window("window[1]", p_.window_right);
  if (!p_.has_scale) p_.scale = 1.0 / std::sqrt(static_cast<double>(p_.q.shape[kDim]));
  p_.has_scale = true;
  if (!std::isfinite(p_.scale)) reject_value("scale is " + text_of(p_.scale) + ", expected a finite number");
  if (!std::isfinite(p_.softcap) || p_.softcap < 0.0) {
    reject_value("softcap is " + text_of(p_.softcap) + ", expected a finite number of at least 0");
  }
  if (!(p_.dropout_p >= 0.0 && p_.dropout_p <= 1.0))
    reject_value("dropout_p is " + text_of(p_.dropout_p) + ", expected 0 to 1");
  // Kernels have both in the accumulator type and in base 2.
  const bool in_double = p_.q.dtype == DType::kFloat64;
  const double most = (in_double ? DBL_MAX : double{FLT_MAX}) / std::numbers::log2e;
  if (std::fabs(p_.scale) > most) {
    reject_value("scale is " + text_of(p_.scale) + ", expected a magnitude of at most " + text_of(most) + " for " +
                 name_of(p_.q.dtype));
  }
  // No score reaches so high a cap; and all below the smallest cap are as good as 0.
  if (p_.softcap > most) p_.softcap = 0.0;
  if (p_.softcap > 0.0) p_.softcap = std::max(p_.softcap, in_double ? DBL_MIN : double{FLT_MIN});
}

}  // namespace foveal
