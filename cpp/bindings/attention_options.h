// The one list of attention's options in C++, in the order of foveal/_options.py, which has the same list for Python.
//
// X(enumerator, name, statement): the place among the arguments of a function of `_core`, the name that callers know,
// and how it is read: of `read` (OptionReader), `value` and `problem`. What is in FOVEAL_NUMBERS is read before q, k
// and v are, what is in FOVEAL_ARRAYS after them.
#pragma once

#define FOVEAL_OPTIONS(ARRAY, NUMBER)                                                                              \
  ARRAY(kMask, mask, problem.mask = read.array("mask", value, Elements::kBool))                                    \
  ARRAY(kBias, bias, problem.bias = read.array("bias", value, Elements::kFloating))                                \
  ARRAY(kAlibiSlopes, alibi_slopes, problem.alibi_slopes = read.array("alibi_slopes", value, Elements::kFloating)) \
  ARRAY(kSinks, sinks, problem.sinks = read.array("sinks", value, Elements::kFloating))                            \
  ARRAY(kGate, gate, read_gate(value, read, problem))                                                              \
  ARRAY(kSpan, span, read_span(value, read, problem))                                                              \
  ARRAY(kU, u, problem.additive = read.array("u", value, Elements::kFloating))                                     \
  ARRAY(kQLens, q_lens, problem.q_lens = read.integers("q_lens", value))                                           \
  ARRAY(kKvLens, kv_lens, problem.kv_lens = read.integers(read.kv_lens, value))                                    \
  NUMBER(kCausal, causal, problem.causal = to_bool("causal", value))                                               \
  ARRAY(kQOffset, q_offset, problem.q_offset = read.integers("q_offset", value))                                   \
  NUMBER(kWindow, window, read_window(value, problem))                                                             \
  NUMBER(kScale, scale, read_scale(value, problem))                                                                \
  NUMBER(kSoftcap, softcap, problem.softcap = to_double("softcap", value))                                         \
  NUMBER(kDropoutP, dropout_p, problem.dropout_p = to_double("dropout_p", value))                                  \
  NUMBER(kSeed, seed, problem.seed = to_seed(value, problem.dropout_p))                                            \
  NUMBER(kNormalizer, normalizer, problem.normalizer = to_normalizer(value))                                       \
  NUMBER(kLayout, layout, problem.layout = to_layout(value))
