// Attention problems for tests: what to ask, and arrays of exactly the memory that a view may touch.
//
// A Case is plain data with defaults; a Problem is a Case with random contents. Every array is a heap block that spans
// from its lowest to its highest element, so that a sanitizer sees the first byte beyond; outputs are filled with a
// pattern first, and what lies between their elements must keep it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "attention/element.h"
#include "foveal/attention.h"

namespace foveal_test {

using foveal::AttentionProblem;
using foveal::DType;
using foveal::TensorView;

constexpr double kLeastTemperature = 0.5;  // of a gate
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How a (B,H,S,D) array lies in memory.
enum class Storage {
  kBhsd,
  kBshd,       // heads inside the sequence
  kPadded,     // gaps after every row, head and batch
  kSpread,     // last stride 3
  kReversed,   // every stride negative
  kColumns,    // (B,H,D,S): the last stride is the length
  kOneRow,     // sequence stride 0 (inputs only)
  kOneColumn,  // last stride 0 (inputs only)
};
constexpr Storage kOutputStorages[] = {Storage::kBhsd,   Storage::kBshd,     Storage::kPadded,
                                       Storage::kSpread, Storage::kReversed, Storage::kColumns};
constexpr Storage kInputStorages[] = {Storage::kBhsd,     Storage::kBshd,    Storage::kPadded, Storage::kSpread,
                                      Storage::kReversed, Storage::kColumns, Storage::kOneRow, Storage::kOneColumn};

class Array {
 public:
  TensorView view;

  Array() = default;
  Array(DType dtype, const std::vector<int64_t>& shape, Storage storage = Storage::kBhsd) {
    view.dtype = dtype;
    view.rank = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    set_strides(storage);
    int64_t low = 0, high = 0;
    for (int axis = 0; axis < view.rank; ++axis) {
      const int64_t reach = view.stride[axis] * std::max<int64_t>(view.shape[axis] - 1, 0);
      (reach < 0 ? low : high) += reach;
    }
    size_ = count() == 0 ? 0 : (high - low + 1) * foveal::itemsize(dtype);
    memory_ = std::make_unique<uint8_t[]>(static_cast<size_t>(size_));
    view.data = memory_.get() - low * foveal::itemsize(dtype);
  }

  int64_t count() const {
    int64_t n = 1;
    for (int axis = 0; axis < view.rank; ++axis) n *= view.shape[axis];
    return n;
  }

  // The element offsets in row-major order of the indices.
  template <class Visit>
  void for_each(Visit visit) const {
    int64_t index[foveal::kMaxRank] = {};
    for (int64_t x = 0, n = count(); x < n; ++x) {
      int64_t offset = 0;
      for (int axis = 0; axis < view.rank; ++axis) offset += index[axis] * view.stride[axis];
      visit(offset);
      for (int axis = view.rank - 1; axis >= 0 && ++index[axis] == view.shape[axis]; --axis) index[axis] = 0;
    }
  }

  int64_t offset(const std::vector<int64_t>& index) const {
    int64_t offset = 0;
    for (size_t axis = 0; axis < index.size(); ++axis) offset += index[axis] * view.stride[axis];
    return offset;
  }
  double at(const std::vector<int64_t>& index) const { return foveal::load_element(view, offset(index)); }
  void set(const std::vector<int64_t>& index, double value) { foveal::store_element(view, offset(index), value); }

  void fill(double value) {
    for_each([&](int64_t offset) { foveal::store_element(view, offset, value); });
  }
  template <class Draw>
  void fill_with(Draw draw) {
    for_each([&](int64_t offset) { foveal::store_element(view, offset, draw()); });
  }

  void poison() { std::memset(memory_.get(), kPoison, static_cast<size_t>(size_)); }
  // Whether every byte that belongs to no element still holds the pattern.
  bool gaps_untouched() const {
    std::vector<bool> owned(static_cast<size_t>(size_), false);
    const int64_t item = foveal::itemsize(view.dtype);
    const int64_t first = static_cast<const uint8_t*>(view.data) - memory_.get();
    for_each([&](int64_t offset) { std::fill_n(owned.begin() + (first + offset * item), item, true); });
    for (int64_t x = 0; x < size_; ++x)
      if (!owned[static_cast<size_t>(x)] && memory_[static_cast<size_t>(x)] != kPoison) return false;
    return true;
  }

  // The elements in index order, as bytes.
  std::vector<uint8_t> contents() const {
    const int64_t item = foveal::itemsize(view.dtype);
    std::vector<uint8_t> bytes;
    for_each([&](int64_t offset) {
      const uint8_t* p = static_cast<const uint8_t*>(view.data) + offset * item;
      bytes.insert(bytes.end(), p, p + item);
    });
    return bytes;
  }

  double max_abs_finite() const {
    double most = 0;
    for_each([&](int64_t offset) {
      const double x = std::fabs(foveal::load_element(view, offset));
      if (std::isfinite(x)) most = std::max(most, x);
    });
    return most;
  }

 private:
  static constexpr uint8_t kPoison = 0xcd;

  void set_strides(Storage storage) {
    const int n = view.rank;
    std::vector<int> order(static_cast<size_t>(n));  // outermost axis first
    for (int axis = 0; axis < n; ++axis) order[static_cast<size_t>(axis)] = axis;
    if (n == 4 && storage == Storage::kBshd) std::swap(order[1], order[2]);
    if (n == 4 && storage == Storage::kColumns) std::swap(order[2], order[3]);
    int64_t stride = storage == Storage::kSpread ? 3 : 1;
    for (int x = n - 1; x >= 0; --x) {
      const int axis = order[static_cast<size_t>(x)];
      view.stride[axis] = storage == Storage::kReversed ? -stride : stride;
      if (storage == Storage::kOneRow && axis == n - 2) view.stride[axis] = 0;
      if (storage == Storage::kOneColumn && axis == n - 1) view.stride[axis] = 0;
      stride *= std::max<int64_t>(view.shape[axis], 1);
      if (storage == Storage::kPadded) stride += 5;
    }
  }

  std::unique_ptr<uint8_t[]> memory_;
  int64_t size_ = 0;
};

struct Case {
  DType dtype = DType::kFloat32;
  int64_t batch = 1, heads = 1, kv_heads = 1, seqlen_q = 4, seqlen_kv = 4, head_dim = 8, value_dim = 8;
  Storage q_storage = Storage::kBhsd, k_storage = Storage::kBhsd, v_storage = Storage::kBhsd,
          out_storage = Storage::kBhsd;
  bool causal = false;
  int64_t window_left = foveal::kUnlimited, window_right = foveal::kUnlimited;
  std::vector<int64_t> q_offset, q_lens, kv_lens;  // empty: not given; q_offset may be one value for all
  double scale = 0;                                // 0: the default
  double softcap = 0, dropout_p = 0;
  foveal::Normalizer normalizer = foveal::Normalizer::kSoftmax;
  int mask = -1, bias = -1;   // bit a set: axis a of (B,Hq,Sq,Skv) has its full extent, else 1; negative: none
  double mask_density = 0.7;  // of true
  DType bias_dtype = DType::kFloat32;
  bool bias_hides = false;  // some -inf
  bool alibi = false, alibi_by_batch = false, sinks = false, lse = true, weights = false;
  int gate = -1;     // as mask, of tau and (B,Hq,Sq)
  int span = -1;     // as mask, of z and (B,Hq)
  double ramp = 20;  // of the span
  bool stats = false;
  int additive = -1;  // as mask, of u and Hq; float32 and float64 only
  uint64_t seed = 1;
};

inline std::string text_of(const Case& c) {
  std::ostringstream s;
  s << foveal::name_of(c.dtype) << " (B,Hq,Hkv,Sq,Skv,D,Dv) = (" << c.batch << ',' << c.heads << ',' << c.kv_heads
    << ',' << c.seqlen_q << ',' << c.seqlen_kv << ',' << c.head_dim << ',' << c.value_dim << ")";
  s << " storage " << static_cast<int>(c.q_storage) << static_cast<int>(c.k_storage) << static_cast<int>(c.v_storage)
    << static_cast<int>(c.out_storage);
  const auto list = [&s](const char* name, const std::vector<int64_t>& values) {
    if (values.empty()) return;
    s << ' ' << name;
    for (const int64_t x : values) s << ' ' << x;
  };
  if (c.causal) s << " causal";
  if (c.window_left >= 0 || c.window_right >= 0) s << " window " << c.window_left << ' ' << c.window_right;
  list("q_offset", c.q_offset);
  list("q_lens", c.q_lens);
  list("kv_lens", c.kv_lens);
  if (c.scale != 0) s << " scale " << c.scale;
  if (c.normalizer != foveal::Normalizer::kSoftmax) s << ' ' << foveal::name_of(c.normalizer);
  if (c.softcap != 0) s << " softcap " << c.softcap;
  if (c.dropout_p != 0) s << " dropout " << c.dropout_p;
  if (c.mask >= 0) s << " mask " << c.mask;
  if (c.bias >= 0)
    s << " bias " << c.bias << ' ' << foveal::name_of(c.bias_dtype) << (c.bias_hides ? " with -inf" : "");
  if (c.alibi) s << (c.alibi_by_batch ? " alibi (B,Hq)" : " alibi");
  if (c.sinks) s << " sinks";
  if (c.gate >= 0) s << " gate " << c.gate;
  if (c.span >= 0) s << " span " << c.span << " ramp " << c.ramp;
  if (c.stats) s << " stats";
  if (c.additive >= 0) s << " additive " << c.additive;
  if (c.weights) s << " weights";
  s << " seed " << c.seed;
  return s.str();
}

class Problem {
 public:
  Case asked;
  Array q, k, v, out, lse, weights, mask, bias, slopes, sinks, gate_tau, gate_temperature, span, u, q_offset, q_lens,
      kv_lens;
  Array entropy, mass, max_weight, threshold, argmax;

  explicit Problem(const Case& c) : asked(c), random_(c.seed) {
    const DType accumulator = c.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    q = Array(c.dtype, {c.batch, c.heads, c.seqlen_q, c.head_dim}, c.q_storage);
    k = Array(c.dtype, {c.batch, c.kv_heads, c.seqlen_kv, c.head_dim}, c.k_storage);
    v = Array(c.dtype, {c.batch, c.kv_heads, c.seqlen_kv, c.value_dim}, c.v_storage);
    for (Array* array : {&q, &k, &v}) array->fill_with([&] { return uniform(-1, 1); });
    out = Array(c.dtype, {c.batch, c.heads, c.seqlen_q, c.value_dim}, c.out_storage);
    if (c.lse) lse = Array(accumulator, {c.batch, c.heads, c.seqlen_q});
    if (c.weights) weights = Array(c.dtype, {c.batch, c.heads, c.seqlen_q, c.seqlen_kv}, c.out_storage);
    const int64_t scores[] = {c.batch, c.heads, c.seqlen_q, c.seqlen_kv};
    const auto broadcast_shape = [&](int axes) {
      std::vector<int64_t> shape;
      for (int axis = 0; axis < 4; ++axis) shape.push_back(axes >> axis & 1 ? scores[axis] : 1);
      return shape;
    };
    if (c.mask >= 0) {
      mask = Array(DType::kBool, broadcast_shape(c.mask));
      mask.for_each([&](int64_t at) { static_cast<uint8_t*>(mask.view.data)[at] = uniform(0, 1) < c.mask_density; });
    }
    if (c.bias >= 0) {
      bias = Array(c.bias_dtype, broadcast_shape(c.bias));
      bias.fill_with([&] { return c.bias_hides && uniform(0, 1) < 0.3 ? -kInfinity : uniform(-2, 2); });
    }
    if (c.alibi) {
      slopes = Array(DType::kFloat32,
                     c.alibi_by_batch ? std::vector<int64_t>{c.batch, c.heads} : std::vector<int64_t>{c.heads});
      slopes.fill_with([&] { return uniform(0, 0.25); });
    }
    if (c.sinks) {
      sinks = Array(DType::kFloat32, {c.heads});
      sinks.fill_with([&] { return uniform(-2, 2); });
    }
    if (c.additive >= 0) {
      u = Array(DType::kFloat32,
                c.additive == 1 ? std::vector<int64_t>{c.heads, c.head_dim} : std::vector<int64_t>{c.head_dim});
      u.fill_with([&] { return uniform(-1, 1); });
      for (Array* array : {&q, &k})
        array->fill_with([&] { return c.scale != 0 ? c.scale * uniform(-1, 1) : uniform(-1, 1); });
    }
    if (c.gate >= 0) {
      gate_tau =
          Array(DType::kFloat32, {c.gate & 1 ? c.batch : 1, c.gate & 2 ? c.heads : 1, c.gate & 4 ? c.seqlen_q : 1});
      gate_tau.fill_with([&] { return uniform(-1, 1); });
      gate_temperature = Array(c.bias_dtype, c.gate & 2 ? std::vector<int64_t>{c.heads} : std::vector<int64_t>{});
      gate_temperature.fill_with([&] { return uniform(kLeastTemperature, 2); });
    }
    if (c.span >= 0) {  // in quarters and an eighth, so that no distance is at an end of the ramp
      span = Array(DType::kFloat32, {c.span & 1 ? c.batch : 1, c.span & 2 ? c.heads : 1});
      span.fill_with([&] { return std::floor(uniform(-40, 240)) / 4 + 0.125; });
    }
    if (c.stats) {
      for (Array* array : {&entropy, &mass, &max_weight, &threshold})
        *array = Array(accumulator, {c.batch, c.heads, c.seqlen_q});
      argmax = Array(DType::kInt64, {c.batch, c.heads, c.seqlen_q});
    }
    q_offset = integers(c.q_offset, DType::kInt64);
    if (c.q_offset.size() == 1) q_offset.view.rank = 0;
    q_lens = integers(c.q_lens, DType::kInt32);
    kv_lens = integers(c.kv_lens, DType::kInt64);
  }

  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }

  AttentionProblem given() const {
    AttentionProblem p;
    p.q = q.view;
    p.k = k.view;
    p.v = v.view;
    p.out = out.view;
    p.lse = lse.view;
    p.weights = weights.view;
    p.mask = mask.view;
    p.bias = bias.view;
    p.alibi_slopes = slopes.view;
    p.sinks = sinks.view;
    p.additive = u.view;
    p.gate_tau = gate_tau.view;
    p.gate_temperature = gate_temperature.view;
    p.span = span.view;
    p.span_ramp = asked.span >= 0 ? asked.ramp : 0;
    p.entropy = entropy.view;
    p.mass = mass.view;
    p.max_weight = max_weight.view;
    p.threshold = threshold.view;
    p.argmax = argmax.view;
    p.q_offset = q_offset.view;
    p.q_lens = q_lens.view;
    p.kv_lens = kv_lens.view;
    p.causal = asked.causal;
    p.window_left = asked.window_left;
    p.window_right = asked.window_right;
    p.has_scale = asked.scale != 0;
    p.scale = asked.scale;
    p.softcap = asked.softcap;
    p.normalizer = asked.normalizer;
    p.dropout_p = asked.dropout_p;
    p.seed = asked.seed * 0x9E3779B97F4A7C15;
    return p;
  }

  // `status` tells why it is of no use.
  foveal::CanonicalProblem canonical(foveal::Status& status) const { return foveal::canonicalize(given(), status); }

 private:
  static Array integers(const std::vector<int64_t>& values, DType dtype) {
    if (values.empty()) return {};
    Array array(dtype, {static_cast<int64_t>(values.size())});
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kInt32)
        static_cast<int32_t*>(array.view.data)[i] = static_cast<int32_t>(values[i]);
      else
        static_cast<int64_t*>(array.view.data)[i] = values[i];
    }
    return array;
  }

  std::mt19937_64 random_;
};

}  // namespace foveal_test
