// Which problems the tests of kernels ask: each option by itself, and mixtures of them at random.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <random>
#include <set>
#include <vector>

#include "attention_case.h"

namespace foveal_test {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

using foveal::Normalizer;

constexpr Normalizer kOtherNormalizers[] = {Normalizer::kSparsemax, Normalizer::kEntmax15, Normalizer::kSigmoid,
                                            Normalizer::kRelu, Normalizer::kNormalizedSigmoid};

// x - 1, x, x + 1 for each x given.
inline std::set<int64_t> around(std::initializer_list<int64_t> values) {
  std::set<int64_t> result;
  for (const int64_t x : values)
    for (const int64_t delta : {-1, 0, 1})
      if (x + delta >= 0) result.insert(x + delta);
  return result;
}

// Two sequences of two groups of heads.
inline Case grouped(DType dtype, int64_t rows, int64_t keys, int64_t head_dim, int64_t value_dim) {
  Case c;
  c.dtype = dtype;
  c.batch = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.seqlen_q = rows;
  c.seqlen_kv = keys;
  c.head_dim = head_dim;
  c.value_dim = value_dim;
  return c;
}

// A case and variations of it, each with a seed of its own.
class Variations {
 public:
  std::vector<Case> cases;

  explicit Variations(const Case& base) : base_(base) {}

  template <class Change>
  void add(Change change) {
    Case c = base_;
    change(c);
    if (c.normalizer != Normalizer::kSoftmax) c.sinks = false;  // which are softmax's alone
    c.seed = cases.size() + 1;
    cases.push_back(c);
  }

 private:
  Case base_;
};

// Each option by itself, on a case of `grouped` with more keys than the kernel's key block.
inline Variations each_option(const Case& base, int64_t key_block) {
  const int64_t rows = base.seqlen_q, keys = base.seqlen_kv;
  Variations list(base);
  list.add([](Case&) {});
  for (const std::vector<int64_t>& offset : std::vector<std::vector<int64_t>>{{},
                                                                              {0},
                                                                              {-1},
                                                                              {-20},
                                                                              {keys - 10},
                                                                              {500},
                                                                              {-500},
                                                                              {3, keys * 4 / 5},
                                                                              {int64_t{1} << 59},
                                                                              {-(int64_t{1} << 59)}}) {
    list.add([&](Case& c) { c.causal = true, c.q_offset = offset; });
    list.add([&](Case& c) { c.window_left = 3, c.window_right = 5, c.q_offset = offset; });
  }
  for (const int64_t left : {int64_t{-1}, int64_t{0}, int64_t{1}, key_block - 1, key_block, int64_t{1} << 61})
    for (const int64_t right : {int64_t{-1}, int64_t{0}, int64_t{64}, (int64_t{1} << 62) + 5})
      list.add([&](Case& c) { c.window_left = left, c.window_right = right, c.q_offset = {keys * 2 / 5}; });
  for (int axes = 0; axes < 16; ++axes) {
    list.add([&](Case& c) { c.mask = axes; });
    list.add([&](Case& c) { c.bias = axes, c.bias_dtype = kDTypes[axes % 4]; });
  }
  for (const double density : {0.0, 0.02, 1.0}) list.add([&](Case& c) { c.mask = 15, c.mask_density = density; });
  for (const DType bias_dtype : kDTypes)
    list.add([&](Case& c) { c.bias = 15, c.bias_dtype = bias_dtype, c.bias_hides = true; });
  for (const double softcap : {0.5, 5.0, 50.0}) list.add([&](Case& c) { c.softcap = softcap, c.scale = 3; });
  for (const double scale : {-0.7, 1e-3, 2.0}) list.add([&](Case& c) { c.scale = scale; });
  for (const double dropout_p : {0.1, 0.9, 1.0}) list.add([&](Case& c) { c.dropout_p = dropout_p; });
  for (const bool by_batch : {false, true}) list.add([&](Case& c) { c.alibi = true, c.alibi_by_batch = by_batch; });
  for (const int axes : {0, 2, 6, 7}) {
    list.add([&](Case& c) { c.gate = axes, c.bias_dtype = kDTypes[axes % 4]; });
    list.add([&](Case& c) { c.gate = axes, c.span = axes & 3, c.causal = true; });
    list.add([&](Case& c) { c.span = axes & 3, c.ramp = axes + 0.5; });
  }
  list.add([&](Case& c) { c.gate = 4, c.span = 2, c.softcap = 5, c.bias = 15, c.bias_hides = true, c.mask = 15; });
  list.add([](Case& c) { c.sinks = true; });
  list.add([](Case& c) { c.sinks = true, c.mask = 12, c.mask_density = 0.01; });
  for (const std::vector<int64_t>& lens :
       std::vector<std::vector<int64_t>>{{0, keys}, {keys - 1, 1}, {key_block, key_block + 1}}) {
    list.add([&](Case& c) { c.kv_lens = lens; });
    list.add([&](Case& c) { c.kv_lens = lens, c.causal = true; });
  }
  list.add([&](Case& c) { c.q_lens = {0, rows}; });
  list.add([&](Case& c) {
    c.q_lens = {rows, rows / 2}, c.kv_lens = {5, keys - 10}, c.causal = true, c.bias = 12, c.sinks = true;
  });
  for (const int64_t kv_heads : {1, 4}) list.add([&](Case& c) { c.kv_heads = kv_heads; });
  list.add([](Case& c) { c.heads = c.kv_heads = 0; });
  list.add([](Case& c) { c.batch = 0; });
  return list;
}

// Additive scores: every normaliser and policy, rows and keys in and beyond the range of the powers.
inline Variations each_additive(const Case& base) {
  Variations list(base);
  for (const int heads : {0, 1})
    for (const double scale : {0.0, 5.0, 60.0}) {
      list.add([&](Case& c) { c.additive = heads, c.scale = scale; });
      list.add(
          [&](Case& c) { c.additive = heads, c.scale = scale, c.causal = true, c.bias = 15, c.gate = 7, c.span = 3; });
      list.add([&](Case& c) { c.additive = heads, c.scale = scale, c.mask = 15, c.softcap = 4, c.sinks = true; });
      list.add([&](Case& c) { c.additive = heads, c.scale = scale, c.dropout_p = 0.3, c.kv_lens = {c.seqlen_kv, 3}; });
      for (const Normalizer normalizer : kOtherNormalizers)
        list.add([&](Case& c) { c.additive = heads, c.scale = scale, c.normalizer = normalizer, c.window_left = 40; });
    }
  return list;
}

// Options in each other's company, dtype by dtype in turn.
class RandomCases {
 public:
  RandomCases(int64_t most_rows, int64_t most_keys) : most_rows_(most_rows), most_keys_(most_keys) {}

  Case next() {
    Case c;
    c.seed = random_();
    c.dtype = kDTypes[count_++ % 4];
    c.batch = 1 + below(3);
    c.kv_heads = 1 + below(2);
    c.heads = c.kv_heads * pick<int64_t>({1, 1, 2, 3, 8});
    c.seqlen_q = 1 + below(chance(2) ? 4 : most_rows_);
    c.seqlen_kv = 1 + below(most_keys_);
    c.head_dim = 1 + below(40);
    c.value_dim = 1 + below(40);
    for (Storage Case::* array : {&Case::q_storage, &Case::k_storage, &Case::v_storage})
      c.*array = kInputStorages[random_() % std::size(kInputStorages)];
    c.out_storage = kOutputStorages[random_() % std::size(kOutputStorages)];
    c.causal = chance(2);
    if (chance(3)) c.window_left = below(200);
    if (chance(3)) c.window_right = below(100);
    if (chance(3)) c.kv_lens.resize(static_cast<size_t>(c.batch));
    for (int64_t& len : c.kv_lens) len = below(c.seqlen_kv + 1);
    if (chance(4)) c.q_lens.resize(static_cast<size_t>(c.batch));
    for (int64_t& len : c.q_lens) len = below(c.seqlen_q + 1);
    if (chance(3)) c.q_offset.resize(chance(2) ? 1 : static_cast<size_t>(c.batch));
    for (int64_t& offset : c.q_offset) offset = below(most_keys_ + 100) - 100;
    if (chance(4)) c.softcap = pick({1.0, 20.0});
    if (chance(4)) c.dropout_p = 0.3;
    if (chance(3)) c.mask = static_cast<int>(below(16));
    c.mask_density = pick({0.05, 0.5, 0.95});
    if (chance(3)) c.bias = static_cast<int>(below(16));
    c.bias_dtype = kDTypes[random_() % 4];
    c.bias_hides = chance(2);
    c.alibi = chance(4);
    c.alibi_by_batch = chance(2);
    c.sinks = chance(4);
    if (chance(4)) c.gate = static_cast<int>(below(8));
    if (chance(4)) c.span = static_cast<int>(below(4));
    c.stats = chance(2);
    if (chance(2)) return c;
    c.normalizer = kOtherNormalizers[random_() % std::size(kOtherNormalizers)];
    c.sinks = false;
    return c;
  }

  bool chance(int in) { return random_() % static_cast<uint64_t>(in) == 0; }

 private:
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[random_() % choices.size()];
  }

  std::mt19937_64 random_{20};
  int64_t most_rows_, most_keys_, count_ = 0;
};

}  // namespace foveal_test
