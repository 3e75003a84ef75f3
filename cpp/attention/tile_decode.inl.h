// The forward kernel for few rows (decoding): head dimensions in the vector lanes.
//
// With one query and thousands of keys the work is reading K and V once, so every row of the head (the query group of
// GQA included) goes with each key while that is in registers, stored halves are widened there, and nothing is packed.
//
//   q   [R][head_dim, padded]   queries times scale * log2(e); R = 1, 2, 4 or 8 rows, the spare ones zero
//   s   [kKeyBlock][R]          scores, then weights: lane l of a vector is row l % R of key l / R
//   o   [R][value_dim, padded]  running sums of weighted values
//
// Same online softmax and the same block boundaries as the forward tile. A long key range is cut by the plan into parts
// that merge.inl.h joins in order.
#pragma once

namespace foveal {
namespace {

constexpr int kDecodeAccumulators = kVectorRegisters >= 32 ? 16 : 8;

template <class V>
constexpr int64_t kDecodeRows = V::kLanes < 8 ? V::kLanes : 8;

// s[NK][R] = k . q for NK keys; `key` gives the address of each.
template <class V, class S, int R, int NK, class Key>
FOVEAL_INLINE void decode_score_step(const typename V::T* q, int64_t q_stride, int64_t head_dim, V scale,
                                     const Key& key, typename V::T* s) {
  using Dot = ScoreDot<V, S>;
  constexpr int kCount = NK * R;
  V acc[kCount];
#pragma GCC unroll 16
  for (int x = 0; x < kCount; ++x) acc[x] = zero<V>();
  int64_t d = 0;
  for (; d + Dot::kChunk <= head_dim; d += Dot::kChunk, q += V::kLanes) {
    V qd[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) qd[r] = load(q + r * q_stride);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const V kd = Dot::load_chunk(key(n) + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[n * R + r] = Dot::multiply_add(kd, qd[r], acc[n * R + r]);
    }
  }
  if (d < head_dim) {
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const V kd = Dot::load_chunk_n(key(n) + d, head_dim - d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[n * R + r] = Dot::multiply_add(kd, load(q + r * q_stride), acc[n * R + r]);
    }
  }
  if constexpr (kCount % V::kLanes == 0) {
#pragma GCC unroll 4
    for (int x = 0; x < kCount; x += V::kLanes)
      store(s + x, Dot::finish(sum_each(*reinterpret_cast<V(*)[V::kLanes]>(acc + x)), scale));
  } else {
    // The same tree as sum_each, so that a key's score does not depend on how many keys came with it.
    V padded[V::kLanes];
    for (int x = 0; x < V::kLanes; ++x) padded[x] = x < kCount ? acc[x] : zero<V>();
    alignas(64) typename V::T lanes[V::kLanes];
    store(lanes, Dot::finish(sum_each(padded), scale));
    for (int x = 0; x < kCount; ++x) s[x] = lanes[x];
  }
}

template <class V, class S, int R>
static void decode_scores(const typename V::T* q, int64_t q_stride, int64_t head_dim, V scale, const Rows<S>& k,
                          int64_t n, typename V::T* s, const Prefetch<S>& next) {
  constexpr int kKeys = kDecodeAccumulators / R;
  const auto run = [&](const auto& key_from) __attribute__((always_inline)) {
    int64_t j = 0;
    for (; j + kKeys <= n; j += kKeys) {
      for (int key = 0; key < kKeys; ++key) next.row(j + key);
      decode_score_step<V, S, R, kKeys>(q, q_stride, head_dim, scale, key_from(j), s + j * R);
    }
    for (; j < n; ++j) decode_score_step<V, S, R, 1>(q, q_stride, head_dim, scale, key_from(j), s + j * R);
  };
  if (k.at != nullptr)
    run([at = k.at](int64_t j) { return [keys = at + j](int x) { return keys[x]; }; });
  else
    run([&k](int64_t j) { return [p = k.p + j * k.stride, stride = k.stride](int x) { return p + x * stride; }; });
}

// o[R][NC vectors] = o * rescale + p^T v. With few sums to keep, keys go to several sets of them in turn, so that one
// addition need not wait for the last.
template <class V, class S, int R, int NC>
FOVEAL_INLINE void decode_value_step(const typename V::T* p, int64_t n, const Rows<S>& v, int64_t column, int64_t width,
                                     typename V::T* o, int64_t o_stride, const typename V::T* rescale,
                                     const Prefetch<S>& next) {
  constexpr int kSets = R * NC >= 8 ? 1 : 8 / (R * NC);
  V acc[kSets][R][NC];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      acc[0][r][c] = load(o + r * o_stride + c * V::kLanes) * broadcast<V>(rescale[r]);
#pragma GCC unroll 8
      for (int set = 1; set < kSets; ++set) acc[set][r][c] = zero<V>();
    }
  const auto add_key = [&](int64_t j, V(&sum)[R][NC]) __attribute__((always_inline)) {
    if (column == 0) next.row(j);
    V vd[NC];
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const S* x = v.row(j) + column + c * V::kLanes;
      vd[c] = NC > 1 || width >= V::kLanes ? widen(x) : widen_n(x, width);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V w = broadcast<V>(p[j * R + r]);
#pragma GCC unroll 8
      for (int c = 0; c < NC; ++c) sum[r][c] = fma(w, vd[c], sum[r][c]);
    }
  };
  int64_t j = 0;
  for (; j + kSets <= n; j += kSets)
#pragma GCC unroll 8
    for (int set = 0; set < kSets; ++set) add_key(j + set, acc[set]);
  for (; j < n; ++j) add_key(j, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
#pragma GCC unroll 3
      for (int half = kSets / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (int set = 0; set < half; ++set) acc[set][r][c] = acc[set][r][c] + acc[set + half][r][c];
      store(o + r * o_stride + c * V::kLanes, acc[0][r][c]);
    }
}

// As many columns at once as there are accumulators for, then half as many, and so on.
template <class V, class S, int R, int NC>
FOVEAL_INLINE void decode_columns(int64_t c, const typename V::T* p, int64_t n, const Rows<S>& v, int64_t value_dim,
                                  typename V::T* o, int64_t o_stride, const typename V::T* rescale,
                                  const Prefetch<S>& next) {
  if constexpr (NC > 1) {
    for (; c + NC * V::kLanes <= value_dim; c += NC * V::kLanes)
      decode_value_step<V, S, R, NC>(p, n, v, c, NC * V::kLanes, o + c, o_stride, rescale, next);
    decode_columns<V, S, R, NC / 2>(c, p, n, v, value_dim, o, o_stride, rescale, next);
  } else {
    for (; c < value_dim; c += V::kLanes)
      decode_value_step<V, S, R, 1>(p, n, v, c, min64(V::kLanes, value_dim - c), o + c, o_stride, rescale, next);
  }
}

template <class V, class S, int R>
static void decode_values(const typename V::T* p, int64_t n, const Rows<S>& v, int64_t value_dim, typename V::T* o,
                          int64_t o_stride, const typename V::T* rescale, const Prefetch<S>& next) {
  constexpr int kColumns = kDecodeAccumulators / R < 8 ? kDecodeAccumulators / R : 8;
  decode_columns<V, S, R, kColumns>(0, p, n, v, value_dim, o, o_stride, rescale, next);
}

// As add_values_guarded of the forward tile: weights with a sign bit are masked, and their values are not read into the
// sum.
template <class V, class S, int R>
static void decode_values_guarded(const typename V::T* p, int64_t n, const Rows<S>& v, int64_t value_dim,
                                  typename V::T* o, int64_t o_stride, const typename V::T* rescale) {
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < value_dim; c += V::kLanes) {
      typename V::T* x = o + r * o_stride + c;
      V acc = load(x) * broadcast<V>(rescale[r]);
      for (int64_t j = 0; j < n; ++j) {
        const typename V::T w = p[j * R + r];
        if (!__builtin_signbit(w))
          acc = fma(broadcast<V>(w), widen_strided<V>(v.row(j) + c, 1, min64(V::kLanes, value_dim - c)), acc);
      }
      store(x, acc);
    }
}

template <class V, int R>
struct DecodeState {
  int64_t row_begin, rows;
  typename V::T *q, *o, *s;
  int64_t q_stride, o_stride;
  bool prefetch;
  V max, sum;  // lane l: of row l % R, the sum over the keys that fell to this lane
};

// Joins the lanes of each row, over the keys of a vector; every lane of a row gets the result.
template <class V, int R, class Join>
FOVEAL_INLINE V over_keys(V x, Join join) {
  alignas(64) typename V::T lanes[V::kLanes];
  store(lanes, x);
#pragma GCC unroll 4
  for (int half = V::kLanes / 2; half >= R; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + half]);
#pragma GCC unroll 16
  for (int lane = R; lane < V::kLanes; ++lane) lanes[lane] = lanes[lane % R];
  return load(lanes);
}

// The scores of keys [begin, begin + n), all policies applied, their per-lane maxima in `highest`.
template <class V, class S, int R>
static Visibility decode_block_scores(const HeadTask& h, const DecodeState<V, R>& state, int64_t begin, int64_t n,
                                      const Rows<S>& k, const Prefetch<S>& next, V& highest) {
  using T = typename V::T;
  constexpr int kKeys = V::kLanes / R;  // keys a vector
  uint64_t bits[kKeyBlock + V::kLanes];
  const Visibility seen = visible_bits(h, state.row_begin, state.rows, begin, n, bits);
  highest = negative_infinity<V>();
  if (seen == Visibility::kNone) return seen;
  T* s = state.s;
  decode_scores<V, S, R>(state.q, state.q_stride, h.head_dim, score_scale<V>(h), k, n, s, next);

  const int64_t padded = round_up(n, kKeys);  // the block's last vector may reach past its keys
  for (int64_t j = n; j < padded; ++j) {
    bits[j] = 0;
    for (int r = 0; r < R; ++r) s[j * R + r] = -static_cast<T>(__builtin_inf());
  }
  if (h.softcap > 0) apply_softcap<V, 1>(s, padded / kKeys, h.softcap);
  if (h.slopes != nullptr) {
    alignas(64) T slopes[V::kLanes], offsets[V::kLanes];
    for (int lane = 0; lane < V::kLanes; ++lane) {
      const int64_t row = state.row_begin + min64(lane % R, state.rows - 1);
      slopes[lane] = static_cast<T>(-h.slopes[row % h.group] * kLog2E);
      offsets[lane] = static_cast<T>(h.q_offset + row / h.group - begin - lane / R);
    }
    const V slope = load(slopes), distance = load(offsets);
    for (int64_t j = 0; j < padded; j += kKeys)
      store(s + j * R, fma(slope, abs(distance - broadcast<V>(static_cast<T>(j))), load(s + j * R)));
  }
  if (h.bias != nullptr) {
    for (int64_t r = 0; r < state.rows; ++r) {
      const int64_t row = state.row_begin + r;
      const int64_t offset = row / h.group * h.bias_stride_s + row % h.group * h.bias_stride_g;
      for (int64_t j0 = 0; j0 < n; j0 += V::kLanes) {
        const int64_t width = min64(V::kLanes, n - j0);
        alignas(64) T lanes[V::kLanes];
        store(lanes, bounded_bias(widen_any<V>(h.bias, h.bias_dtype, offset + (begin + j0) * h.bias_stride_k,
                                               h.bias_stride_k, width)));
        for (int64_t j = 0; j < width; ++j) s[(j0 + j) * R + r] += lanes[j] * static_cast<T>(kLog2E);
      }
    }
  }
  const bool masked = seen == Visibility::kPartial || padded != n;
  if (seen == Visibility::kFull && masked)
    for (int64_t j = 0; j < n; ++j) bits[j] = ~uint64_t{0};
  for (int64_t j = 0; j < padded; j += kKeys) {
    V x = load(s + j * R);
    if (masked) {
      uint64_t lanes = 0;
      for (int key = 0; key < kKeys; ++key) lanes |= (bits[j + key] & low_bits(R)) << (key * R);
      x = select(mask_from_bits<V>(lanes), x, negative_infinity<V>());
      store(s + j * R, x);
    }
    highest = max(highest, x);
  }
  return seen;
}

template <class V, class S, int R>
static void decode_block(const HeadTask& h, DecodeState<V, R>& state, int64_t begin, int64_t n, const Rows<S>& k,
                         const Rows<S>& v, const Rows<S>& next_k) {
  using T = typename V::T;
  V highest;
  const Visibility seen =
      decode_block_scores<V, S, R>(h, state, begin, n, k, Prefetch<S>{v, state.prefetch ? h.value_dim : 0}, highest);
  if (seen == Visibility::kNone) return;
  const V now = max(state.max, over_keys<V, R>(highest, [](T x, T y) { return x > y ? x : y; }));
  const V shift = or_zero_if_unseen(now);
  const V factor = exp2_nonpositive(state.max - shift);
  state.max = now;

  const bool guarded = seen == Visibility::kPartial && !all_finite<V>(v, n, h.value_dim);
  const V masked = zero<V>() * broadcast<V>(-1);
  V sum = zero<V>();
  for (int64_t x = 0; x < round_up(n * R, V::kLanes); x += V::kLanes) {
    const V score = load(state.s + x);
    const V w = exp2_nonpositive(score - shift);
    sum = sum + w;
    store(state.s + x, guarded ? select(equal(score, negative_infinity<V>()), masked, w) : w);
  }
  state.sum = fma(state.sum, factor, sum);
  alignas(64) T rescale[V::kLanes];
  store(rescale, factor);
  const Prefetch<S> next = {next_k, state.prefetch ? h.head_dim : 0};
  if (guarded)
    decode_values_guarded<V, S, R>(state.s, n, v, h.value_dim, state.o, state.o_stride, rescale);
  else if constexpr (kPairsValues<V, S, R>)
    decode_paired_values<R, kDecodeAccumulators / R / 2>(state.s, n, v, h.value_dim, state.o, state.o_stride, rescale,
                                                         next);
  else
    decode_values<V, S, R>(state.s, n, v, h.value_dim, state.o, state.o_stride, rescale, next);
}

template <class V>
static int64_t decode_scratch_nbytes(const HeadTask& h, int64_t) {
  const int64_t n = kDecodeRows<V> * (round_up(h.head_dim, V::kLanes) + round_up(h.value_dim, V::kLanes) + kKeyBlock) +
                    kKeyBlock * (h.head_dim + h.value_dim);
  return round_up(n * static_cast<int64_t>(sizeof(typename V::T)) + 5 * 64, 64);
}

template <class V, class S, int R>
static void decode_rows(const RowTask& task) {
  using T = typename V::T;
  const HeadTask& h = *task.head;
  Arena<T> arena{static_cast<T*>(task.scratch)};
  DecodeState<V, R> state;
  state.row_begin = task.row_begin;
  state.rows = task.row_end - task.row_begin;
  using Dot = ScoreDot<V, S>;
  state.q_stride = round_up(h.head_dim, Dot::kChunk) / Dot::kChunk * V::kLanes;
  state.o_stride = round_up(h.value_dim, V::kLanes);
  state.q = arena.take(R * state.q_stride);
  state.o = arena.take(R * state.o_stride);
  state.s = arena.take(R * kKeyBlock);
  alignas(64) T row_max[V::kLanes], row_sum[V::kLanes];
  for (int64_t r = 0; r < R; ++r) {
    const int64_t row = task.row_begin + r;
    const S* q = static_cast<const S*>(h.q) + row / h.group * h.q_stride_s + row % h.group * h.q_stride_g;
    for (int64_t x = 0, d = 0; d < h.head_dim; x += V::kLanes, d += Dot::kChunk)
      store(state.q + r * state.q_stride + x,
            r < state.rows ? Dot::load_query(q + d * h.q_stride_d, h.q_stride_d, h.head_dim - d, score_scale<V>(h))
                           : zero<V>());
    for (int64_t c = 0; c < state.o_stride; c += V::kLanes) store(state.o + r * state.o_stride + c, zero<V>());
    begin_row(h, row, task.partial == nullptr, row_max + r, row_sum + r);
  }
  // A sink counts once, in the lane of the row's first key.
  for (int lane = R; lane < V::kLanes; ++lane) {
    row_max[lane] = row_max[lane % R];
    row_sum[lane] = 0;
  }
  state.max = load(row_max);
  state.sum = load(row_sum);

  KeyRange range = visible_keys(h, task.row_begin, task.row_end);
  range = {max64(range.begin, task.key_begin), min64(range.end, task.key_end)};
  state.prefetch =
      h.k_scales == nullptr &&  // its own reader asks for codes
      (range.end - range.begin) * (h.head_dim + h.value_dim) * static_cast<int64_t>(sizeof(S)) > kPrefetchFromBytes;
  S* packed_k = reinterpret_cast<S*>(arena.take(kKeyBlock * h.head_dim));
  S* packed_v = reinterpret_cast<S*>(arena.take(kKeyBlock * h.value_dim));
  const S* k_pointers[kKeyBlock];
  const S* v_pointers[kKeyBlock];
  const S* next_pointers[kKeyBlock];
  const bool paged_in_place = h.pages != nullptr && h.k_scales == nullptr && h.k_stride_d == 1;
  for (int64_t block = range.begin / kKeyBlock * kKeyBlock; block < range.end; block += kKeyBlock) {
    const int64_t begin = max64(block, range.begin), n = min64(block + kKeyBlock, range.end) - begin;
    const Rows<S> k = key_rows<V, S, S>(h, keys_of(h), begin, n, packed_k, k_pointers);
    const Rows<S> v = key_rows<V, S, S>(h, values_of(h), begin, n, packed_v, v_pointers);
    Rows<S> next = {k.p + n * k.stride, k.stride};
    if (paged_in_place && state.prefetch && begin + n < range.end) {
      const int64_t count = min64(n, range.end - begin - n);
      const Rows<S> rows = key_rows<V, S, S>(h, keys_of(h), begin + n, count, packed_k, next_pointers);
      for (int64_t j = 0; j < n; ++j) next_pointers[j] = rows.row(min64(j, count - 1));
      next = {nullptr, 0, next_pointers};
    } else if (k.at != nullptr) {
      next = k;
    }
    decode_block<V, S, R>(h, state, begin, n, k, v, next);
  }

  store(row_max, state.max);
  store(row_sum, over_keys<V, R>(state.sum, [](T x, T y) { return x + y; }));
  for (int64_t r = 0; r < state.rows; ++r) {
    const int64_t row = task.row_begin + r;
    const T* o = state.o + r * state.o_stride;
    if (task.row_max != nullptr) static_cast<T*>(task.row_max)[r] = row_max[r];
    if (task.row_sum != nullptr) static_cast<T*>(task.row_sum)[r] = row_sum[r];
    const V factor = inverse_or_zero(broadcast<V>(row_sum[r]));
    S* out = static_cast<S*>(h.out) + row / h.group * h.out_stride_s + row % h.group * h.out_stride_g;
    for (int64_t c = 0; c < h.value_dim; c += V::kLanes) {
      const int64_t n = min64(V::kLanes, h.value_dim - c);
      if (task.partial != nullptr)
        narrow_n(static_cast<T*>(task.partial) + r * h.value_dim + c, load(o + c), n);
      else
        narrow_strided(out + c * h.out_stride_d, h.out_stride_d, load(o + c) * factor, n);
    }
  }
}

template <class V, class S>
static void decode(const RowTask& task) {
  const int64_t rows = task.row_end - task.row_begin;
  if (rows == 1) return decode_rows<V, S, 1>(task);
  if constexpr (kDecodeRows<V> > 4)
    if (rows > 4) return decode_rows<V, S, 8>(task);
  if constexpr (kDecodeRows<V> > 2)
    if (rows > 2) return decode_rows<V, S, 4>(task);
  decode_rows<V, S, 2>(task);
}

}  // namespace
}  // namespace foveal
