// The members of the structs that callers fill, by name: for what must not overlook one. A struct with a member that is
// not listed here does not compile.
#pragma once

#include <cstddef>

#include "foveal/attention.h"

namespace foveal {

struct Anything {
  template <class T>
  operator T() const;
};

// Of an aggregate: how many values it can be initialised from.
template <class Struct, class... Values>
consteval size_t count_members() {
  if constexpr (requires { Struct{Values{}..., Anything{}}; })
    return count_members<Struct, Values..., Anything>();
  else
    return sizeof...(Values);
}

template <class Struct>
struct Members;

// Calls visit(name, pointer to member) for each, in the order in which arguments are judged.
template <class Struct, class Visit>
constexpr void for_each_member(Visit visit) {
  Members<Struct>::for_each(visit);
}

#define FOVEAL_MEMBER(name) visit(#name, &Struct::name)

template <>
struct Members<Device> {
  using Struct = Device;
  template <class Visit>
  static constexpr void for_each(Visit& visit) {
    FOVEAL_MEMBER(type), FOVEAL_MEMBER(index);
  }
};

template <>
struct Members<TensorView> {
  using Struct = TensorView;
  template <class Visit>
  static constexpr void for_each(Visit& visit) {
    FOVEAL_MEMBER(data), FOVEAL_MEMBER(dtype), FOVEAL_MEMBER(device), FOVEAL_MEMBER(rank), FOVEAL_MEMBER(shape),
        FOVEAL_MEMBER(stride);
  }
};

template <>
struct Members<AttentionProblem> {
  using Struct = AttentionProblem;
  template <class Visit>
  static constexpr void for_each(Visit& visit) {
    FOVEAL_MEMBER(q), FOVEAL_MEMBER(k), FOVEAL_MEMBER(v), FOVEAL_MEMBER(additive), FOVEAL_MEMBER(mask),
        FOVEAL_MEMBER(bias), FOVEAL_MEMBER(alibi_slopes), FOVEAL_MEMBER(sinks), FOVEAL_MEMBER(gate_tau),
        FOVEAL_MEMBER(gate_temperature), FOVEAL_MEMBER(span), FOVEAL_MEMBER(q_lens), FOVEAL_MEMBER(kv_lens),
        FOVEAL_MEMBER(q_offset), FOVEAL_MEMBER(cu_seqlens_q), FOVEAL_MEMBER(cu_seqlens_kv), FOVEAL_MEMBER(block_table),
        FOVEAL_MEMBER(k_scale), FOVEAL_MEMBER(v_scale), FOVEAL_MEMBER(out), FOVEAL_MEMBER(lse), FOVEAL_MEMBER(weights),
        FOVEAL_MEMBER(entropy), FOVEAL_MEMBER(mass), FOVEAL_MEMBER(max_weight), FOVEAL_MEMBER(threshold),
        FOVEAL_MEMBER(argmax), FOVEAL_MEMBER(key_mass), FOVEAL_MEMBER(top_keys), FOVEAL_MEMBER(top_weights),
        FOVEAL_MEMBER(layout), FOVEAL_MEMBER(causal), FOVEAL_MEMBER(window_left), FOVEAL_MEMBER(window_right),
        FOVEAL_MEMBER(has_scale), FOVEAL_MEMBER(scale), FOVEAL_MEMBER(softcap), FOVEAL_MEMBER(span_ramp),
        FOVEAL_MEMBER(normalizer), FOVEAL_MEMBER(dropout_p), FOVEAL_MEMBER(seed);
  }
};

template <>
struct Members<AttentionGradients> {
  using Struct = AttentionGradients;
  template <class Visit>
  static constexpr void for_each(Visit& visit) {
    FOVEAL_MEMBER(dout), FOVEAL_MEMBER(dlse), FOVEAL_MEMBER(dentropy), FOVEAL_MEMBER(dq), FOVEAL_MEMBER(dk),
        FOVEAL_MEMBER(dv), FOVEAL_MEMBER(dbias), FOVEAL_MEMBER(dsinks), FOVEAL_MEMBER(dgate_tau),
        FOVEAL_MEMBER(dgate_temperature), FOVEAL_MEMBER(dspan), FOVEAL_MEMBER(dadditive);
  }
};

#undef FOVEAL_MEMBER

template <class Struct>
consteval size_t count_listed_members() {
  size_t count = 0;
  for_each_member<Struct>([&count](const char*, auto) { ++count; });
  return count;
}

static_assert(count_listed_members<Device>() == count_members<Device>());
static_assert(count_members<TensorView>() == count_listed_members<TensorView>() - 2 + 2 * kMaxRank);  // of two arrays
static_assert(count_listed_members<AttentionProblem>() == count_members<AttentionProblem>());
static_assert(count_listed_members<AttentionGradients>() == count_members<AttentionGradients>());

}  // namespace foveal
