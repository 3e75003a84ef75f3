// The plain three-pass oracle: attention one query row at a time, in float64, with every option written where it acts.
//
//   s_j = softcap(scale * q.k_j) + alibi + bias_j      for the keys j that this query sees
//   s_j = u . tanh(q + k_j), with additive scores, in place of scale * q.k_j
//   s_j = s_j + log sigmoid((s_j - tau) / T)           with a gate
//   s_j = s_j + log clamp((ramp + z - |i - j|) / ramp, 0, 1)   with a span
//   p_j = exp(s_j - m),  m = max over j (and the sink)
//   out = sum_j f_j p_j v_j / l,  l = sum_j p_j (plus exp(sink - m)),  lse = m + log l,  f_j = 1 without dropout
//
// It defines what kernels must compute. A key that mask, causal, window or lengths hide is never read. A score of -inf
// hides its key too: whatever v holds there adds nothing. Any other NaN or infinity takes the way of the formula, so a
// NaN score or a score of +inf makes its row NaN. A row that sees nothing gives out 0, weights 0 and lse -inf (the
// sink's value when there is one); so does a row past q_len, whose lse is -inf even with a sink.
//
// Other normalisers weigh by their own formula (weigh, below), from the same scores. Thresholds come from sorting, as
// in the papers. What takes the place of lse is what the row saves: the threshold, or log n of a pointwise one.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "attention/element.h"
#include "foveal/attention.h"
#include "kernels/philox.h"

namespace foveal {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t offset_of(const TensorView& view, int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) {
  const int64_t index[] = {i0, i1, i2, i3};
  int64_t offset = 0;
  for (int axis = 0; axis < view.rank; ++axis) offset += index[axis] * view.stride[axis];
  return offset;
}

struct Row {
  int64_t b, h, kv_head, i;
  int64_t position;  // of the query among the keys: q_offset + i
  int64_t kv_len;
  bool inside;  // i < q_len
};

// By position alone.
bool in_reach(const CanonicalProblem& p, const Row& row, int64_t j) {
  if (p.causal && j > row.position) return false;
  if (p.window_left != kUnlimited && j < row.position - p.window_left) return false;
  return p.window_right == kUnlimited || j <= row.position + p.window_right;
}

bool sees(const CanonicalProblem& p, const Row& row, int64_t j) {
  if (!in_reach(p, row, j)) return false;
  return !p.mask.present() || static_cast<const uint8_t*>(p.mask.data)[offset_of(p.mask, row.b, row.h, row.i, j)] != 0;
}

double sigmoid(double x) { return x >= 0.0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x)); }
double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

// What a score's gradient becomes on the way back.
struct Slopes {
  double softcap = 0.0, gate = 0.0;                 // d after / d before
  double tau = 0.0, temperature = 0.0, span = 0.0;  // d score / d parameter
};

double score(const CanonicalProblem& p, const Row& row, int64_t j, Slopes* slopes = nullptr) {
  double dot = 0.0;
  for (int64_t d = 0; d < p.q.shape[3]; ++d) {
    const double q = load_element(p.q, offset_of(p.q, row.b, row.h, row.i, d));
    const double k = load_element(p.k, offset_of(p.k, row.b, row.kv_head, j, d));
    dot += p.additive.present() ? load_element(p.additive, offset_of(p.additive, row.h, d)) * std::tanh(q + k) : q * k;
  }
  double s = p.additive.present() ? dot : p.scale * dot;
  const double t = p.softcap > 0.0 ? std::tanh(s / p.softcap) : 0.0;
  if (p.softcap > 0.0) s = p.softcap * t;
  if (slopes != nullptr) *slopes = {1.0 - t * t, 1.0, 0.0, 0.0, 0.0};
  if (p.alibi_slopes.present()) {
    const double slope = load_element(p.alibi_slopes, offset_of(p.alibi_slopes, row.b, row.h));
    s -= slope * static_cast<double>(std::abs(row.position - j));
  }
  if (p.bias.present()) s += load_element(p.bias, offset_of(p.bias, row.b, row.h, row.i, j));
  if (p.gate_tau.present()) {
    const double temperature = load_element(p.gate_temperature, offset_of(p.gate_temperature, row.h));
    const double x = (s - load_element(p.gate_tau, offset_of(p.gate_tau, row.b, row.h, row.i))) / temperature;
    if (slopes != nullptr) {
      slopes->gate = 1.0 + sigmoid(-x) / temperature;
      slopes->tau = -sigmoid(-x) / temperature;
      slopes->temperature = -sigmoid(-x) * x / temperature;
    }
    s += log_sigmoid(x);
  }
  if (p.span.present()) {
    const double left = p.span_ramp + load_element(p.span, offset_of(p.span, row.b, row.h)) -
                        static_cast<double>(std::abs(row.position - j));
    if (slopes != nullptr) slopes->span = left > 0.0 && left < p.span_ramp ? 1.0 / left : 0.0;
    if (left <= 0.0) return -kInfinity;
    if (!(left >= p.span_ramp)) s += std::log(left / p.span_ramp);
  }
  return s;
}

// What dropout multiplies the weight of key j by.
double kept(const CanonicalProblem& p, const Row& row, int64_t j) {
  if (p.dropout_p == 0.0) return 1.0;
  const auto batch = static_cast<uint32_t>(row.b), head = static_cast<uint32_t>(row.h);
  const double word = dropout_words(p.seed, batch, head, row.i, j).word[j % 4];
  return word < std::round(p.dropout_p * 0x1p32) ? 0.0 : 1.0 / (1.0 - p.dropout_p);
}

// The threshold of a row whose arguments, -inf where hidden, sum to more than enough: over the k largest, for the
// largest k whose smallest is above the threshold of these k (Martins & Astudillo 2016, algorithm 1; Peters et al.
// 2019, algorithm 2). Arguments are less the largest, so that sums lose nothing.
double threshold_of(Normalizer normalizer, std::vector<double> arguments) {
  std::sort(arguments.begin(), arguments.end(), std::greater<>());
  double sum = 0, squares = 0, threshold = 0;
  for (size_t x = 0; x < arguments.size() && arguments[x] > -kInfinity; ++x) {
    sum += arguments[x];
    squares += arguments[x] * arguments[x];
    const auto k = static_cast<double>(x + 1);
    const double mean = sum / k;
    const double spread = (1.0 - (squares - k * mean * mean)) / k;
    const double solved =
        normalizer == Normalizer::kSparsemax ? (sum - 1.0) / k : mean - std::sqrt(std::max(spread, 0.0));
    if (solved >= arguments[x]) break;
    threshold = solved;
  }
  return threshold;
}

// How many keys position and length leave to a row.
double count_of(const CanonicalProblem& p, const Row& row) {
  double n = 0;
  for (int64_t j = 0; j < row.kv_len; ++j) n += in_reach(p, row, j) ? 1.0 : 0.0;
  return n;
}

// The weights of a row from its scores, -inf where hidden; returns what the row saves.
double weigh(const CanonicalProblem& p, const Row& row, const std::vector<double>& scores, double sink,
             std::vector<double>& weights) {
  const Normalizer normalizer = p.normalizer;
  weights.assign(scores.size(), 0.0);
  if (is_pointwise(normalizer)) {
    const double n = count_of(p, row);
    for (size_t j = 0; j < scores.size(); ++j) {
      if (scores[j] == -kInfinity) continue;
      weights[j] = normalizer == Normalizer::kSigmoid ? sigmoid(scores[j] - std::log(n))
                   : std::isnan(scores[j])            ? scores[j]
                                                      : std::max(scores[j], 0.0) / n;
    }
    return n > 0.0 ? std::log(n) : -kInfinity;
  }
  // A NaN becomes the maximum and remains it.
  std::vector<double> arguments = scores;
  if (normalizer == Normalizer::kNormalizedSigmoid)
    for (double& s : arguments) s = s == -kInfinity ? s : log_sigmoid(s);
  double max = sink;
  for (const double s : arguments)
    if (s > max || std::isnan(s)) max = s;
  if (has_threshold(normalizer)) {
    if (max == -kInfinity) return -kInfinity;
    const double unit = normalizer == Normalizer::kSparsemax ? 1.0 : 0.5;
    bool whole = std::isfinite(max);
    for (double& s : arguments) s = s == -kInfinity ? s : unit * (s - max);
    const double threshold = whole ? threshold_of(normalizer, arguments) : std::nan("");
    for (size_t j = 0; j < scores.size(); ++j) {
      if (scores[j] == -kInfinity) continue;
      const double above = whole ? std::max(arguments[j] - threshold, 0.0) : std::nan("");
      weights[j] = normalizer == Normalizer::kSparsemax ? above : above * above;
    }
    return unit * max + threshold;
  }
  // With nothing to attend to the denominator is 0, and exp(-inf - -inf) must not make it NaN.
  double sum = sink == -kInfinity ? 0.0 : std::exp(sink - max);
  for (const double s : arguments) sum += s == -kInfinity ? 0.0 : std::exp(s - max);
  for (size_t j = 0; j < scores.size(); ++j)
    if (scores[j] != -kInfinity) weights[j] = std::exp(arguments[j] - max) / sum;
  return sum == 0.0 ? -kInfinity : max + std::log(sum);
}

// Whether a key can add anything to the output.
bool counts(Normalizer normalizer, double score, double weight) {
  return score != -kInfinity && !(weight == 0.0 && hides_zero_weights(normalizer));
}

// The entropy of w / sum w, and what the weights sum to.
double entropy_of(const std::vector<double>& weights, double& mass) {
  mass = 0.0;
  for (const double w : weights) mass += w;
  double entropy = 0.0;
  for (const double w : weights)
    if (w != 0.0) entropy -= w / mass * std::log(w / mass);
  return entropy;
}

void describe(const CanonicalProblem& p, const Row& row, const std::vector<double>& scores,
              const std::vector<double>& weights, double saved) {
  double mass = 0.0, max_weight = 0.0;
  const double entropy = entropy_of(weights, mass);
  int64_t argmax = -1;
  for (size_t j = 0; j < scores.size() && mass > 0.0; ++j) {
    max_weight = std::max(max_weight, weights[j]);
    if (scores[j] > (argmax < 0 ? -kInfinity : scores[static_cast<size_t>(argmax)])) argmax = static_cast<int64_t>(j);
  }
  const auto put = [&](const TensorView& view, double value) {
    if (view.present()) store_element(view, offset_of(view, row.b, row.h, row.i), value);
  };
  put(p.entropy, entropy);
  put(p.mass, mass);
  put(p.max_weight, max_weight);
  put(p.threshold, has_threshold(p.normalizer) ? (mass > 0.0 ? saved : kInfinity) : 0.0);
  if (p.argmax.present()) static_cast<int64_t*>(p.argmax.data)[offset_of(p.argmax, row.b, row.h, row.i)] = argmax;

  for (size_t j = 0; j < weights.size() && p.key_mass.present(); ++j) {
    const int64_t at = offset_of(p.key_mass, row.b, row.h, static_cast<int64_t>(j));
    store_element(p.key_mass, at, load_element(p.key_mass, at) + weights[j]);
  }
  if (!p.top_keys.present()) return;
  std::vector<int64_t> keys(weights.size());
  std::iota(keys.begin(), keys.end(), int64_t{0});
  const auto weight = [&](int64_t j) { return weights[static_cast<size_t>(j)]; };
  std::stable_sort(keys.begin(), keys.end(), [&](int64_t x, int64_t y) { return weight(x) > weight(y); });
  for (int64_t x = 0; x < p.top_keys.shape[3]; ++x) {
    const bool any = x < static_cast<int64_t>(weights.size()) && weight(keys[static_cast<size_t>(x)]) > 0.0;
    static_cast<int64_t*>(p.top_keys.data)[offset_of(p.top_keys, row.b, row.h, row.i, x)] =
        any ? keys[static_cast<size_t>(x)] : -1;
    store_element(p.top_weights, offset_of(p.top_weights, row.b, row.h, row.i, x),
                  any ? weight(keys[static_cast<size_t>(x)]) : 0.0);
  }
}

// One query row; `scores` and `weights` are scratch, of kv_len elements.
void attend(const CanonicalProblem& p, const Row& row, std::vector<double>& scores, std::vector<double>& weights) {
  const double sink = p.sinks.present() ? load_element(p.sinks, offset_of(p.sinks, row.h)) : -kInfinity;
  for (size_t j = 0; j < scores.size(); ++j) scores[j] = sees(p, row, j) ? score(p, row, j) : -kInfinity;
  const double saved = weigh(p, row, scores, sink, weights);
  if (p.lse.present()) store_element(p.lse, offset_of(p.lse, row.b, row.h, row.i), saved);

  if (p.has_statistics()) describe(p, row, scores, weights, saved);
  if (!p.out.present()) return;

  // The sum of weighted values. A hidden key is stepped over: 0 * v would be NaN for an infinite v.
  std::vector<double> out(static_cast<size_t>(p.v.shape[3]), 0.0);
  for (size_t j = 0; j < scores.size(); ++j) {
    if (!counts(p.normalizer, scores[j], weights[j])) continue;
    const double weight = kept(p, row, static_cast<int64_t>(j)) * weights[j];
    if (p.weights.present()) store_element(p.weights, offset_of(p.weights, row.b, row.h, row.i, j), weight);
    for (size_t d = 0; d < out.size(); ++d) {
      out[d] += weight * load_element(p.v, offset_of(p.v, row.b, row.kv_head, j, d));
    }
  }
  for (size_t d = 0; d < out.size(); ++d) store_element(p.out, offset_of(p.out, row.b, row.h, row.i, d), out[d]);
}

// What a row without any visible key holds, and where `attend` starts from: keys that it steps over have weight 0.
void clear(const CanonicalProblem& p, const Row& row) {
  if (p.has_statistics()) describe(p, row, {}, {}, 0.0);
  for (int64_t d = 0; d < p.out.shape[3] && p.out.present(); ++d)
    store_element(p.out, offset_of(p.out, row.b, row.h, row.i, d), 0.0);
  if (p.lse.present()) store_element(p.lse, offset_of(p.lse, row.b, row.h, row.i), -kInfinity);
  if (!p.weights.present()) return;
  for (int64_t j = 0; j < p.weights.shape[3]; ++j) {
    store_element(p.weights, offset_of(p.weights, row.b, row.h, row.i, j), 0.0);
  }
}

void add(const TensorView& view, int64_t offset, double value) {
  store_element(view, offset, load_element(view, offset) + value);
}

// What one query row adds to the gradients. With w_j the weights, dp_j = dout.v_j and dlse the gradient of lse, the
// gradient of score j, and of bias j, is
//
//   softmax              ds_j = w_j (dp_j - sum_i w_i dp_i + dlse); the sink is a score whose dp is 0
//   sparsemax, entmax15  ds_j = g_j (dp_j - sum_i g_i dp_i / sum_i g_i), g = 1 where w > 0, and sqrt(w)
//   sigmoid              ds_j = w_j (1 - w_j) dp_j
//   relu                 ds_j = dp_j / n where w_j > 0
//   normalized_sigmoid   that of softmax, times 1 - sigmoid(s_j)
//
// The entropy H of p = w / W, W = sum w, adds -dH (log p_j + H) / W to dp_j, before what is above.
// Dropout is a factor of dp_j, and of w_j where it meets dout.
void differentiate(const CanonicalGradients& g, const Row& row) {
  const CanonicalProblem& p = g.problem;
  const Normalizer normalizer = p.normalizer;
  const double sink = p.sinks.present() ? load_element(p.sinks, offset_of(p.sinks, row.h)) : -kInfinity;
  const double dlse = g.dlse.present() ? load_element(g.dlse, offset_of(g.dlse, row.b, row.h, row.i)) : 0.0;
  const auto size = static_cast<size_t>(row.kv_len);
  std::vector<double> scores(size, -kInfinity), weights;
  std::vector<Slopes> slopes(size);
  for (size_t j = 0; j < size; ++j)
    if (sees(p, row, static_cast<int64_t>(j))) scores[j] = score(p, row, static_cast<int64_t>(j), &slopes[j]);
  const double saved = weigh(p, row, scores, sink, weights);
  const double n = is_pointwise(normalizer) ? count_of(p, row) : 0.0;

  double mass = 0.0;
  const double entropy = entropy_of(weights, mass);
  const double dentropy =
      g.dentropy.present() && mass > 0.0 ? load_element(g.dentropy, offset_of(g.dentropy, row.b, row.h, row.i)) : 0.0;

  struct Key {
    int64_t j;
    double factor, w, g, dp;
  };
  std::vector<Key> keys;
  double slope_sum = 0.0, delta = 0.0;
  for (size_t x = 0; x < size; ++x) {
    if (!counts(normalizer, scores[x], weights[x])) continue;
    const auto j = static_cast<int64_t>(x);
    Key key = {j, kept(p, row, j), weights[x], weights[x], 0.0};
    if (normalizer == Normalizer::kSparsemax) key.g = std::isnan(key.w) ? key.w : 1.0;
    if (normalizer == Normalizer::kEntmax15) key.g = std::sqrt(key.w);
    for (int64_t d = 0; d < p.v.shape[3]; ++d) {
      key.dp += load_element(g.dout, offset_of(g.dout, row.b, row.h, row.i, d)) *
                load_element(p.v, offset_of(p.v, row.b, row.kv_head, j, d));
    }
    key.dp *= key.factor;
    if (dentropy != 0.0 && key.w > 0.0) key.dp -= dentropy / mass * (std::log(key.w / mass) + entropy);
    slope_sum += key.g;
    delta += key.g * key.dp;
    keys.push_back(key);
  }
  if (has_threshold(normalizer)) delta /= slope_sum;
  delta -= dlse;
  for (const Key& key : keys) {
    for (int64_t d = 0; d < p.v.shape[3]; ++d) {
      add(g.dv, offset_of(g.dv, row.b, row.kv_head, key.j, d),
          key.factor * key.w * load_element(g.dout, offset_of(g.dout, row.b, row.h, row.i, d)));
    }
    const auto x = static_cast<size_t>(key.j);
    double ds = key.g * (key.dp - delta);
    if (normalizer == Normalizer::kSigmoid) ds = key.w * (1.0 - key.w) * key.dp;
    if (normalizer == Normalizer::kRelu) ds = key.dp / n;
    if (normalizer == Normalizer::kNormalizedSigmoid) ds *= sigmoid(-scores[x]);
    const Slopes& slope = slopes[x];
    if (g.dgate_tau.present()) add(g.dgate_tau, offset_of(g.dgate_tau, row.b, row.h, row.i), ds * slope.tau);
    if (g.dgate_temperature.present())
      add(g.dgate_temperature, offset_of(g.dgate_temperature, row.h), ds * slope.temperature);
    if (g.dspan.present()) add(g.dspan, offset_of(g.dspan, row.b, row.h), ds * slope.span);
    ds *= slope.gate;
    if (g.dbias.present()) add(g.dbias, offset_of(g.dbias, row.b, row.h, row.i, key.j), ds);
    for (int64_t d = 0; d < p.q.shape[3]; ++d) {
      const int64_t q = offset_of(p.q, row.b, row.h, row.i, d), k = offset_of(p.k, row.b, row.kv_head, key.j, d);
      if (p.additive.present()) {
        const double t = std::tanh(load_element(p.q, q) + load_element(p.k, k)), score = ds * slope.softcap;
        const double inner = score * load_element(p.additive, offset_of(p.additive, row.h, d)) * (1.0 - t * t);
        add(g.dq, offset_of(g.dq, row.b, row.h, row.i, d), inner);
        add(g.dk, offset_of(g.dk, row.b, row.kv_head, key.j, d), inner);
        if (g.dadditive.present()) add(g.dadditive, offset_of(g.dadditive, row.h, d), score * t);
        continue;
      }
      add(g.dq, offset_of(g.dq, row.b, row.h, row.i, d), p.scale * ds * slope.softcap * load_element(p.k, k));
      add(g.dk, offset_of(g.dk, row.b, row.kv_head, key.j, d), p.scale * ds * slope.softcap * load_element(p.q, q));
    }
  }
  if (g.dsinks.present() && sink != -kInfinity)
    add(g.dsinks, offset_of(g.dsinks, row.h), -std::exp(sink - saved) * delta);
}

void fill(const TensorView& view, double value) {
  if (!view.present()) return;
  const auto extent = [&](int axis) { return axis < view.rank ? view.shape[axis] : 1; };
  for (int64_t i0 = 0; i0 < extent(0); ++i0)
    for (int64_t i1 = 0; i1 < extent(1); ++i1)
      for (int64_t i2 = 0; i2 < extent(2); ++i2)
        for (int64_t i3 = 0; i3 < extent(3); ++i3) store_element(view, offset_of(view, i0, i1, i2, i3), value);
}

// visit(row) for every query row of the problem, rows past q_len too.
template <class Visit>
void for_each_row(const CanonicalProblem& p, Visit visit) {
  const int64_t num_heads = p.q.shape[1], num_kv_heads = p.k.shape[1];
  for (int64_t b = 0; b < p.q.shape[0]; ++b) {
    const int64_t q_len = p.q_lens.present() ? load_integer(p.q_lens, b) : p.q.shape[2];
    const int64_t kv_len = p.kv_lens.present() ? load_integer(p.kv_lens, b) : p.k.shape[2];
    const int64_t q_offset = p.q_offset.present() ? load_integer(p.q_offset, b) : kv_len - q_len;
    for (int64_t h = 0; h < num_heads; ++h)
      for (int64_t i = 0; i < p.q.shape[2]; ++i)
        visit(Row{b, h, h / (num_heads / num_kv_heads), i, q_offset + i, kv_len, i < q_len});
  }
}

}  // namespace

Status attention_reference(const CanonicalProblem& problem) try {
  if (problem.packed() || problem.paged())
    return {ErrorKind::kNotImplemented, "the oracle reads neither packed sequences nor pages"};
  std::vector<double> scores, weights;
  fill(problem.key_mass, 0.0);
  for_each_row(problem, [&](const Row& row) {
    clear(problem, row);
    scores.resize(static_cast<size_t>(row.kv_len));
    if (row.inside) attend(problem, row, scores, weights);
  });
  return {};
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "out of memory"};
}

Status attention_backward_reference(const CanonicalGradients& g) try {
  for (const TensorView* view :
       {&g.dq, &g.dk, &g.dv, &g.dbias, &g.dsinks, &g.dgate_tau, &g.dgate_temperature, &g.dspan, &g.dadditive})
    fill(*view, 0.0);
  for_each_row(g.problem, [&](const Row& row) {
    if (row.inside) differentiate(g, row);
  });
  return {};
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "out of memory"};
}

}  // namespace foveal
