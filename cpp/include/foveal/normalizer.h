// How a row's scores become weights: the list of normalisers. docs/mechanisms.md has the formulas.
#pragma once

#include <cstdint>

namespace foveal {

// docs/extending.md says what a new one adds. Names are those of the interface, in the same order.
enum class Normalizer : uint8_t { kSoftmax, kSparsemax, kEntmax15, kSigmoid, kRelu, kNormalizedSigmoid };
constexpr const char* kNormalizerNames[] = {"softmax", "sparsemax", "entmax15",
                                            "sigmoid", "relu",      "normalized_sigmoid"};
constexpr int kNormalizers = sizeof kNormalizerNames / sizeof *kNormalizerNames;

constexpr const char* name_of(Normalizer n) { return kNormalizerNames[static_cast<int>(n)]; }

// Weights are 0 below a threshold that depends on the whole row.
constexpr bool has_threshold(Normalizer n) { return n == Normalizer::kSparsemax || n == Normalizer::kEntmax15; }

// A weight depends on its own score and on the number of keys that position and length leave to the row.
constexpr bool is_pointwise(Normalizer n) { return n == Normalizer::kSigmoid || n == Normalizer::kRelu; }

// A key whose weight is 0 never reaches the output, whatever its value holds.
constexpr bool hides_zero_weights(Normalizer n) { return has_threshold(n) || n == Normalizer::kRelu; }

}  // namespace foveal
