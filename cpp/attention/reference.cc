// The plain three-pass oracle: attention one query row at a time, in float64, with every option written where it acts.
//
//   s_j = softcap(scale * q.k_j) + alibi + bias_j      for the keys j that this query sees
//   p_j = exp(s_j - m),  m = max over j (and the sink)
//   out = sum_j p_j v_j / l,  l = sum_j p_j (plus exp(sink - m)),  lse = m + log l
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
};

bool sees(const AttentionProblem& p, const Row& row, int64_t j) {
  if (p.causal && j > row.position) return false;
  if (p.window_left != kUnlimited && j < row.position - p.window_left) return false;
  if (p.window_right != kUnlimited && j > row.position + p.window_right) return false;
  return !p.mask.present() || static_cast<const uint8_t*>(p.mask.data)[offset_of(p.mask, row.b, row.h, row.i, j)] != 0;
}

double score(const AttentionProblem& p, const Row& row, int64_t j) {
  double dot = 0.0;
  for (int64_t d = 0; d < p.q.shape[3]; ++d) {
    dot += load_element(p.q, offset_of(p.q, row.b, row.h, row.i, d)) *
           load_element(p.k, offset_of(p.k, row.b, row.kv_head, j, d));
  }
  double s = p.scale * dot;
  if (p.softcap > 0.0) s = p.softcap * std::tanh(s / p.softcap);
  if (p.alibi_slopes.present()) {
    const double slope = load_element(p.alibi_slopes, offset_of(p.alibi_slopes, row.b, row.h));
    s -= slope * static_cast<double>(std::abs(row.position - j));
  }
  if (p.bias.present()) s += load_element(p.bias, offset_of(p.bias, row.b, row.h, row.i, j));
  return s;
}

// One query row; `scores` is scratch of kv_len elements.
void attend(const AttentionProblem& p, const Row& row, std::vector<double>& scores) {
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
    const double weight = std::exp(scores[j] - max) / sum;
    if (p.weights.present()) store_element(p.weights, offset_of(p.weights, row.b, row.h, row.i, j), weight);
    for (size_t d = 0; d < out.size(); ++d) {
      out[d] += weight * load_element(p.v, offset_of(p.v, row.b, row.kv_head, j, d));
    }
  }
  for (size_t d = 0; d < out.size(); ++d) store_element(p.out, offset_of(p.out, row.b, row.h, row.i, d), out[d]);
}

// What a row without any visible key holds, and where `attend` starts from: keys that it steps over have weight 0.
void clear(const AttentionProblem& p, const Row& row) {
  for (int64_t d = 0; d < p.out.shape[3]; ++d) store_element(p.out, offset_of(p.out, row.b, row.h, row.i, d), 0.0);
  if (p.lse.present()) store_element(p.lse, offset_of(p.lse, row.b, row.h, row.i), -kInfinity);
  if (!p.weights.present()) return;
  for (int64_t j = 0; j < p.weights.shape[3]; ++j) {
    store_element(p.weights, offset_of(p.weights, row.b, row.h, row.i, j), 0.0);
  }
}

}  // namespace

Status attention_reference(const AttentionProblem& problem) try {
  const AttentionProblem& p = problem;
  const int64_t batch = p.q.shape[0], num_heads = p.q.shape[1], seqlen_q = p.q.shape[2];
  const int64_t num_kv_heads = p.k.shape[1], seqlen_kv = p.k.shape[2];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t q_len = p.q_lens.present() ? load_integer(p.q_lens, b) : seqlen_q;
    const int64_t kv_len = p.kv_lens.present() ? load_integer(p.kv_lens, b) : seqlen_kv;
    const int64_t q_offset = p.q_offset.present() ? load_integer(p.q_offset, b) : kv_len - q_len;
    std::vector<double> scores(static_cast<size_t>(kv_len));
    for (int64_t h = 0; h < num_heads; ++h) {
      for (int64_t i = 0; i < seqlen_q; ++i) {
        const Row row{b, h, h / (num_heads / num_kv_heads), i, q_offset + i};
        clear(p, row);
        if (i < q_len) attend(p, row, scores);
      }
    }
  }
  return {};
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "attention: out of memory"};
}

}  // namespace foveal
