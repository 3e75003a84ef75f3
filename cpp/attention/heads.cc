#include "attention/heads.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numbers>

#include "attention/element.h"

namespace foveal {

Sequence sequence_at(const CanonicalProblem& p, int64_t b) {
  Sequence s;
  s.q_begin = s.kv_begin = 0;
  if (p.packed()) {
    s.q_begin = load_integer(p.cu_seqlens_q, b);
    s.kv_begin = load_integer(p.cu_seqlens_kv, b);
    s.q_len = load_integer(p.cu_seqlens_q, b + 1) - s.q_begin;
    s.kv_len = load_integer(p.cu_seqlens_kv, b + 1) - s.kv_begin;
  } else {
    s.q_len = p.q_lens.present() ? load_integer(p.q_lens, b) : p.q.shape[2];
    s.kv_len = p.kv_lens.present() ? load_integer(p.kv_lens, b) : p.k.shape[2];
  }
  const int64_t offset = p.q_offset.present() ? load_integer(p.q_offset, b) : s.kv_len - s.q_len;
  s.q_offset = std::clamp(offset, -kPositionLimit / 2, kPositionLimit / 2);
  return s;
}

Heads::Heads(const CanonicalProblem& problem) : p_(problem) {
  if (p_.k.shape[1] > 0) group_ = p_.q.shape[1] / p_.k.shape[1];
  // Kernels have scores in base 2: a sink, and a slope times any distance, must stay finite there.
  const double most = (p_.q.dtype == DType::kFloat64 ? DBL_MAX : double{FLT_MAX}) / std::numbers::log2e * 0.999998;
  const double least_temperature = 1 / most;  // whose inverse is finite
  const auto bounded = [](double x, double limit) { return std::isfinite(x) ? std::clamp(x, -limit, limit) : x; };
  if (p_.alibi_slopes.present()) {
    const TensorView& slopes = p_.alibi_slopes;
    for (int64_t b = 0; b < p_.q.shape[0]; ++b) {
      const Sequence s = sequence_at(p_, b);
      const auto longest = static_cast<double>(std::abs(s.q_offset) + s.q_len + s.kv_len + 1);
      for (int64_t h = 0; h < p_.q.shape[1]; ++h)
        slopes_.push_back(bounded(load_element(slopes, b * slopes.stride[0] + h * slopes.stride[1]), most / longest));
    }
  }
  if (p_.sinks.present())
    for (int64_t h = 0; h < p_.q.shape[1]; ++h)
      sinks_.push_back(bounded(load_element(p_.sinks, h * p_.sinks.stride[0]), most));
  if (p_.additive.present())
    for (int64_t h = 0; h < p_.q.shape[1]; ++h)
      for (int64_t a = 0; a < p_.q.shape[3]; ++a)
        additive_.push_back(load_element(p_.additive, h * p_.additive.stride[0] + a * p_.additive.stride[1]));
  if (p_.gate_tau.present()) {
    const TensorView &tau = p_.gate_tau, &temperature = p_.gate_temperature;
    const int64_t longest = p_.q.shape[2];
    gate_taus_.resize(static_cast<size_t>(p_.q.shape[0] * p_.q.shape[1] * longest));
    for (int64_t b = 0; b < p_.q.shape[0] && !gate_taus_.empty(); ++b) {
      const Sequence s = sequence_at(p_, b);
      for (int64_t h = 0; h < p_.q.shape[1]; ++h)
        for (int64_t i = 0; i < s.q_len; ++i)
          gate_taus_[static_cast<size_t>((b * p_.k.shape[1] + h / group_) * longest * group_ + i * group_ +
                                         h % group_)] =
              bounded(load_element(tau, b * tau.stride[0] + h * tau.stride[1] + (s.q_begin + i) * tau.stride[2]), most);
    }
    for (int64_t h = 0; h < p_.q.shape[1]; ++h)
      gate_temperatures_.push_back(std::max(load_element(temperature, h * temperature.stride[0]), least_temperature));
  }
  if (p_.span.present())
    for (int64_t b = 0; b < p_.q.shape[0]; ++b)
      for (int64_t h = 0; h < p_.q.shape[1]; ++h)
        spans_.push_back(load_element(p_.span, b * p_.span.stride[0] + h * p_.span.stride[1]));
  if (!p_.paged()) return;
  const TensorView& table = p_.block_table;
  pages_.assign(static_cast<size_t>(table.shape[0] * table.shape[1]), 0);
  for (int64_t b = 0; b < table.shape[0]; ++b) {
    const int64_t used = (sequence_at(p_, b).kv_len + p_.k.shape[2] - 1) / std::max<int64_t>(p_.k.shape[2], 1);
    for (int64_t page = 0; page < used; ++page)
      pages_[static_cast<size_t>(b * table.shape[1] + page)] =
          static_cast<int32_t>(integer_at(table, b * table.stride[0] + page * table.stride[1]));
  }
  // Of the pages of each sequence: a cache may have many more.
  const auto read_scales = [&](const TensorView& scale, std::vector<float>& scales) {
    if (!scale.present()) return;
    for (int64_t head = 0; head < scale.shape[1]; ++head)
      for (const int32_t page : pages_)
        scales.push_back(scale.shape[0] == 0 ? 0
                                             : static_cast<float>(load_element(
                                                   scale, page * scale.stride[0] + head * scale.stride[1])));
  };
  read_scales(p_.k_scale, k_scales_);
  read_scales(p_.v_scale, v_scales_);
}

HeadTask Heads::task(int64_t b, int64_t kv_head) const {
  const CanonicalProblem& p = p_;
  const Sequence s = sequence_at(p, b);
  const int64_t q_head = kv_head * group_;
  const auto at = [b](const TensorView& view, int64_t head, int64_t row = 0) {
    return address_of(view, b * view.stride[0] + head * view.stride[1] + row * view.stride[2]);
  };
  HeadTask h = {};
  h.q = at(p.q, q_head, s.q_begin);
  h.q_stride_s = p.q.stride[2];
  h.q_stride_g = p.q.stride[1];
  h.q_stride_d = p.q.stride[3];
  if (p.paged()) {
    h.k = address_of(p.k, kv_head * p.k.stride[1]);
    h.v = address_of(p.v, kv_head * p.v.stride[1]);
    h.pages = pages_.data() + b * p.block_table.shape[1];
    h.page_size = p.k.shape[2];
    h.k_stride_page = p.k.stride[0];
    h.v_stride_page = p.v.stride[0];
    if (!k_scales_.empty()) {
      const int64_t first = kv_head * static_cast<int64_t>(pages_.size()) + b * p.block_table.shape[1];
      h.k_scales = k_scales_.data() + first;
      h.v_scales = v_scales_.data() + first;
    }
  } else {
    h.k = at(p.k, kv_head, s.kv_begin);
    h.v = at(p.v, kv_head, s.kv_begin);
  }
  h.kv_dtype = p.k.dtype;
  h.k_stride_s = p.k.stride[2];
  h.k_stride_d = p.k.stride[3];
  h.v_stride_s = p.v.stride[2];
  h.v_stride_d = p.v.stride[3];
  h.head_dim = p.q.shape[3];
  if (p.out.present()) {  // else no values are added up
    h.out = at(p.out, q_head, s.q_begin);
    h.out_stride_s = p.out.stride[2];
    h.out_stride_g = p.out.stride[1];
    h.out_stride_d = p.out.stride[3];
    h.value_dim = p.v.shape[3];
  } else {
    h.out = const_cast<void*>(h.q);  // of no columns
  }
  h.group = group_;
  h.kv_len = s.kv_len;
  h.q_offset = s.q_offset;
  const auto limit = [](int64_t window) { return window < 0 ? kPositionLimit : std::min(window, kPositionLimit); };
  h.window_left = limit(p.window_left);
  h.window_right = p.causal ? 0 : limit(p.window_right);
  h.counted_left = h.window_left;
  h.counted_right = h.window_right;
  h.scale = p.scale;
  if (!additive_.empty()) {
    h.additive = additive_.data() + q_head * p.q.shape[3];
    h.scale = 1;
  }
  h.softcap = p.softcap;
  h.normalizer = p.normalizer;
  if (!slopes_.empty()) h.slopes = slopes_.data() + b * p.q.shape[1] + q_head;
  if (!sinks_.empty()) h.sinks = sinks_.data() + q_head;
  if (p.gate_tau.present()) {
    h.gate_taus = gate_taus_.data() + (b * p.k.shape[1] + kv_head) * p.q.shape[2] * group_;
    h.gate_temperatures = gate_temperatures_.data() + q_head;
  }
  if (!spans_.empty()) {
    h.spans = spans_.data() + b * p.q.shape[1] + q_head;
    h.span_ramp = p.span_ramp;
    // Keys further than this weigh nothing in any head of the group.
    double longest = -INFINITY;
    for (int64_t g = 0; g < group_; ++g) longest = std::isnan(h.spans[g]) ? INFINITY : std::max(longest, h.spans[g]);
    if (const double reach = p.span_ramp + longest; reach < static_cast<double>(kPositionLimit)) {
      const auto last = static_cast<int64_t>(std::ceil(std::max(reach, 0.0)));
      h.window_left = std::min(h.window_left, last);
      h.window_right = std::min(h.window_right, last);
    }
  }
  h.dropout_threshold = static_cast<uint64_t>(std::llround(p.dropout_p * 0x1p32));
  h.dropout_scale = p.dropout_p < 1.0 ? 1.0 / (1.0 - p.dropout_p) : 0.0;
  h.seed = p.seed;
  h.batch = static_cast<uint32_t>(b);
  h.q_head = static_cast<uint32_t>(q_head);
  if (p.mask.present()) {
    h.mask = static_cast<const uint8_t*>(at(p.mask, q_head));
    h.mask_stride_s = p.mask.stride[2];
    h.mask_stride_g = p.mask.stride[1];
    h.mask_stride_k = p.mask.stride[3];
  }
  if (p.bias.present()) {
    h.bias = at(p.bias, q_head);
    h.bias_dtype = p.bias.dtype;
    h.bias_stride_s = p.bias.stride[2];
    h.bias_stride_g = p.bias.stride[1];
    h.bias_stride_k = p.bias.stride[3];
  }
  if (p.weights.present()) {
    h.weights = at(p.weights, q_head);
    h.weights_stride_s = p.weights.stride[2];
    h.weights_stride_g = p.weights.stride[1];
    h.weights_stride_k = p.weights.stride[3];
  }
  return h;
}

void* address_of(const TensorView& view, int64_t elements) {
  return view.data == nullptr ? nullptr : static_cast<std::byte*>(view.data) + elements * itemsize(view.dtype);
}

void fill_zero(const TensorView& view, int64_t b, int64_t h, int64_t begin, int64_t end) {
  if (!view.present() || view.data == nullptr) return;
  const auto size = static_cast<size_t>(itemsize(view.dtype));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = b * view.stride[0] + h * view.stride[1] + i * view.stride[2];
    if (view.stride[3] == 1) {
      std::memset(address_of(view, row), 0, static_cast<size_t>(view.shape[3]) * size);
    } else {
      for (int64_t c = 0; c < view.shape[3]; ++c) std::memset(address_of(view, row + c * view.stride[3]), 0, size);
    }
  }
}

}  // namespace foveal
