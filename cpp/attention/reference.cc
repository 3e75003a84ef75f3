// The plain three-pass oracle: attention one query row at a time, in float64, with every option written where it acts.
//
//   s_j = softcap(scale * q.k_j) + alibi + bias_j      for the keys j that this query sees
//   p_j = exp(s_j - m),  m = max over j (and the sink)
//   out = sum_j f_j p_j v_j / l,  l = sum_j p_j (plus exp(sink - m)),  lse = m + log l,  f_j = 1 without dropout
//
// It defines what kernels must compute. A key that mask, causal, window or lengths hide is never read. A score of -inf
// hides its key too: whatever v holds there adds nothing. Any other NaN or infinity takes the way of the formula, so a
// NaN score or a score of +inf makes its row NaN. A row that sees nothing gives out 0, weights 0 and lse -inf (the
// sink's value when there is one); so does a row past q_len, whose lse is -inf even with a sink.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
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

bool sees(const CanonicalProblem& p, const Row& row, int64_t j) {
  if (p.causal && j > row.position) return false;
  if (p.window_left != kUnlimited && j < row.position - p.window_left) return false;
  if (p.window_right != kUnlimited && j > row.position + p.window_right) return false;
  return !p.mask.present() || static_cast<const uint8_t*>(p.mask.data)[offset_of(p.mask, row.b, row.h, row.i, j)] != 0;
}

// `slope`, where given: d score / d (scale * q.k).
double score(const CanonicalProblem& p, const Row& row, int64_t j, double* slope = nullptr) {
  double dot = 0.0;
  for (int64_t d = 0; d < p.q.shape[3]; ++d) {
    dot += load_element(p.q, offset_of(p.q, row.b, row.h, row.i, d)) *
           load_element(p.k, offset_of(p.k, row.b, row.kv_head, j, d));
  }
  double s = p.scale * dot;
  const double t = p.softcap > 0.0 ? std::tanh(s / p.softcap) : 0.0;
  if (p.softcap > 0.0) s = p.softcap * t;
  if (slope != nullptr) *slope = 1.0 - t * t;
  if (p.alibi_slopes.present()) {
    const double slope = load_element(p.alibi_slopes, offset_of(p.alibi_slopes, row.b, row.h));
    s -= slope * static_cast<double>(std::abs(row.position - j));
  }
  if (p.bias.present()) s += load_element(p.bias, offset_of(p.bias, row.b, row.h, row.i, j));
  return s;
}

// What dropout multiplies the weight of key j by.
double kept(const CanonicalProblem& p, const Row& row, int64_t j) {
  if (p.dropout_p == 0.0) return 1.0;
  const auto batch = static_cast<uint32_t>(row.b), head = static_cast<uint32_t>(row.h);
  const double word = dropout_words(p.seed, batch, head, row.i, j).word[j % 4];
  return word < std::round(p.dropout_p * 0x1p32) ? 0.0 : 1.0 / (1.0 - p.dropout_p);
}

// One query row; `scores` is scratch of kv_len elements.
void attend(const CanonicalProblem& p, const Row& row, std::vector<double>& scores) {
  const double sink = p.sinks.present() ? load_element(p.sinks, offset_of(p.sinks, row.h)) : -kInfinity;

  // Pass 1: the scores, -inf where hidden, and their maximum. A NaN becomes the maximum and remains it.
  double max = sink;
  for (size_t j = 0; j < scores.size(); ++j) {
    scores[j] = sees(p, row, j) ? score(p, row, j) : -kInfinity;
    if (scores[j] > max || std::isnan(scores[j])) max = scores[j];
  }

  // Pass 2: the denominator. With nothing to attend to it is 0, and exp(-inf - -inf) must not make it NaN.
  double sum = sink == -kInfinity ? 0.0 : std::exp(sink - max);
  for (const double s : scores) sum += s == -kInfinity ? 0.0 : std::exp(s - max);
  if (p.lse.present()) {
    store_element(p.lse, offset_of(p.lse, row.b, row.h, row.i), sum == 0.0 ? -kInfinity : max + std::log(sum));
  }

  // Pass 3: the weights and the average of v. A hidden key is stepped over: 0 * v would be NaN for an infinite v.
  std::vector<double> out(static_cast<size_t>(p.v.shape[3]), 0.0);
  for (size_t j = 0; j < scores.size(); ++j) {
    if (scores[j] == -kInfinity) continue;
    const double weight = kept(p, row, static_cast<int64_t>(j)) * std::exp(scores[j] - max) / sum;
    if (p.weights.present()) store_element(p.weights, offset_of(p.weights, row.b, row.h, row.i, j), weight);
    for (size_t d = 0; d < out.size(); ++d) {
      out[d] += weight * load_element(p.v, offset_of(p.v, row.b, row.kv_head, j, d));
    }
  }
  for (size_t d = 0; d < out.size(); ++d) store_element(p.out, offset_of(p.out, row.b, row.h, row.i, d), out[d]);
}

// What a row without any visible key holds, and where `attend` starts from: keys that it steps over have weight 0.
void clear(const CanonicalProblem& p, const Row& row) {
  for (int64_t d = 0; d < p.out.shape[3]; ++d) store_element(p.out, offset_of(p.out, row.b, row.h, row.i, d), 0.0);
  if (p.lse.present()) store_element(p.lse, offset_of(p.lse, row.b, row.h, row.i), -kInfinity);
  if (!p.weights.present()) return;
  for (int64_t j = 0; j < p.weights.shape[3]; ++j) {
    store_element(p.weights, offset_of(p.weights, row.b, row.h, row.i, j), 0.0);
  }
}

void add(const TensorView& view, int64_t offset, double value) {
  store_element(view, offset, load_element(view, offset) + value);
}

// What one query row adds to the gradients. With p_j = exp(s_j - lse), dp_j = dout.v_j and dlse the gradient of lse,
//
//   ds_j = p_j (dp_j - sum_i p_i dp_i + dlse)
//
// is the gradient of score j, and of bias j; the sink is a score whose dp is 0. Dropout is a factor of dp_j, and of p_j
// where it meets dout.
void differentiate(const CanonicalGradients& g, const Row& row) {
  const CanonicalProblem& p = g.problem;
  const double sink = p.sinks.present() ? load_element(p.sinks, offset_of(p.sinks, row.h)) : -kInfinity;
  const double dlse = g.dlse.present() ? load_element(g.dlse, offset_of(g.dlse, row.b, row.h, row.i)) : 0.0;
  struct Key {
    int64_t j;
    double score, slope, factor, p, dp;
  };
  std::vector<Key> keys;
  double max = sink;
  for (int64_t j = 0; j < row.kv_len; ++j) {
    if (!sees(p, row, j)) continue;
    Key key = {j, 0, 0, kept(p, row, j), 0, 0};
    key.score = score(p, row, j, &key.slope);
    if (key.score == -kInfinity) continue;
    if (key.score > max || std::isnan(key.score)) max = key.score;
    keys.push_back(key);
  }
  double sum = sink == -kInfinity ? 0.0 : std::exp(sink - max);
  for (const Key& key : keys) sum += std::exp(key.score - max);
  double delta = -dlse;
  for (Key& key : keys) {
    key.p = std::exp(key.score - max) / sum;
    for (int64_t d = 0; d < p.v.shape[3]; ++d) {
      key.dp += load_element(g.dout, offset_of(g.dout, row.b, row.h, row.i, d)) *
                load_element(p.v, offset_of(p.v, row.b, row.kv_head, key.j, d));
    }
    key.dp *= key.factor;
    delta += key.p * key.dp;
  }
  for (const Key& key : keys) {
    for (int64_t d = 0; d < p.v.shape[3]; ++d) {
      add(g.dv, offset_of(g.dv, row.b, row.kv_head, key.j, d),
          key.factor * key.p * load_element(g.dout, offset_of(g.dout, row.b, row.h, row.i, d)));
    }
    const double ds = key.p * (key.dp - delta);
    if (g.dbias.present()) add(g.dbias, offset_of(g.dbias, row.b, row.h, row.i, key.j), ds);
    for (int64_t d = 0; d < p.q.shape[3]; ++d) {
      const int64_t q = offset_of(p.q, row.b, row.h, row.i, d), k = offset_of(p.k, row.b, row.kv_head, key.j, d);
      add(g.dq, offset_of(g.dq, row.b, row.h, row.i, d), p.scale * ds * key.slope * load_element(p.k, k));
      add(g.dk, offset_of(g.dk, row.b, row.kv_head, key.j, d), p.scale * ds * key.slope * load_element(p.q, q));
    }
  }
  if (g.dsinks.present() && sink != -kInfinity) {
    add(g.dsinks, offset_of(g.dsinks, row.h), -std::exp(sink - max) / sum * delta);
  }
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
  std::vector<double> scores;
  for_each_row(problem, [&](const Row& row) {
    clear(problem, row);
    scores.resize(static_cast<size_t>(row.kv_len));
    if (row.inside) attend(problem, row, scores);
  });
  return {};
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "out of memory"};
}

Status attention_backward_reference(const CanonicalGradients& g) try {
  for (const TensorView* view : {&g.dq, &g.dk, &g.dv, &g.dbias, &g.dsinks}) fill(*view, 0.0);
  for_each_row(g.problem, [&](const Row& row) {
    if (row.inside) differentiate(g, row);
  });
  return {};
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "out of memory"};
}

}  // namespace foveal
