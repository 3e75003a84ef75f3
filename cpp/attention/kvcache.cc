// Attention to a cache of keys and values (Kwon et al. 2023, "PagedAttention") that may grow first.
//
// New tokens are written at the lengths given, turned by rotary embeddings (Su et al. 2021, "RoFormer") where there are
// tables, in float32 (float64 for float64) with one rounding; int8 caches take round(x / scale), at most 127 in
// magnitude. Everything has been checked before the first write.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "attention/element.h"
#include "attention/heads.h"
#include "foveal/attention.h"
#include "kernels/stored.h"

namespace foveal {
namespace {

// ---- elements -------------------------------------------------------------------------------------------------------

// T is float or double.
template <class T>
T load_as(const TensorView& view, int64_t offset) {
  if (view.dtype == DType::kFloat32) return static_cast<T>(static_cast<const float*>(view.data)[offset]);
  if (view.dtype == DType::kBFloat16)
    return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(view.data)[offset]) << 16);
  return static_cast<T>(load_element(view, offset));
}

template <class T>
void store_as(const TensorView& view, int64_t offset, T value) {
  if (view.dtype != DType::kBFloat16) return store_element(view, offset, value);
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  const uint32_t rounded = std::isnan(value) ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  static_cast<uint16_t*>(view.data)[offset] = static_cast<uint16_t>(rounded >> 16);
}

// ---- one token of one head ------------------------------------------------------------------------------------------

// Row `from` of `source` goes to row `to` of `target` (elements of their last axis): turned by `position` where the
// tables are there, in steps of `scale` where the target is int8.
template <class T>
class Writer {
 public:
  Writer(const CacheUpdate& u, int64_t width) : u_(u), row_(static_cast<size_t>(width)) {}

  void write(const TensorView& source, int64_t from, const TensorView& target, int64_t to, int64_t position,
             bool turned, double scale) {
    const int64_t width = source.shape[3];
    if (!turned && source.dtype == target.dtype && source.stride[3] == 1 && target.stride[3] == 1) {
      std::memcpy(address_of(target, to), address_of(source, from),
                  static_cast<size_t>(width * itemsize(source.dtype)));
      return;
    }
    for (int64_t c = 0; c < width; ++c) row_[static_cast<size_t>(c)] = load_as<T>(source, from + c * source.stride[3]);
    if (turned) turn(position);
    for (int64_t c = 0; c < width; ++c) {
      const T x = row_[static_cast<size_t>(c)];
      const int64_t offset = to + c * target.stride[3];
      if (target.dtype == DType::kInt8)
        static_cast<int8_t*>(target.data)[offset] = Stored<int8_t>::encode(x, scale);
      else
        store_as(target, offset, x);
    }
  }

 private:
  // A pair is two neighbours, or a feature and the one `pairs` further on.
  void turn(int64_t position) {
    const TensorView& cosines = u_.rotary_cos;
    const TensorView& sines = u_.rotary_sin;
    const int64_t pairs = cosines.shape[1];
    for (int64_t x = 0; x < pairs; ++x) {
      const T cosine = load_as<T>(cosines, position * cosines.stride[0] + x * cosines.stride[1]);
      const T sine = load_as<T>(sines, position * sines.stride[0] + x * sines.stride[1]);
      T& first = row_[static_cast<size_t>(u_.rotary_interleaved ? 2 * x : x)];
      T& second = row_[static_cast<size_t>(u_.rotary_interleaved ? 2 * x + 1 : x + pairs)];
      const T a = first, b = second;
      first = a * cosine - b * sine;
      second = a * sine + b * cosine;
    }
  }

  const CacheUpdate& u_;
  std::vector<T> row_;
};

template <class T>
void append(const CanonicalUpdate& u) {
  const CanonicalProblem& p = u.problem;
  const int64_t page_size = p.k.shape[2], added = u.k.shape[2];
  Writer<T> writer(u, std::max(p.k.shape[3], p.v.shape[3]));
  const auto scale_of = [](const TensorView& scale, int64_t page, int64_t head) {
    return scale.present() ? load_element(scale, page * scale.stride[0] + head * scale.stride[1]) : 0.0;
  };
  for (int64_t b = 0; b < p.q.shape[0]; ++b)
    for (int64_t i = 0; i < added; ++i) {
      const int64_t position = load_integer(p.kv_lens, b) - added + i;
      const TensorView& table = p.block_table;
      const int64_t page = integer_at(table, b * table.stride[0] + position / page_size * table.stride[1]);
      const int64_t row = position % page_size;
      for (int64_t h = 0; h < p.k.shape[1]; ++h) {
        const auto from = [&](const TensorView& x) { return b * x.stride[0] + h * x.stride[1] + i * x.stride[2]; };
        const auto to = [&](const TensorView& x) { return page * x.stride[0] + h * x.stride[1] + row * x.stride[2]; };
        writer.write(u.k, from(u.k), p.k, to(p.k), position, u.rotary_cos.present(), scale_of(p.k_scale, page, h));
        writer.write(u.v, from(u.v), p.v, to(p.v), position, false, scale_of(p.v_scale, page, h));
      }
    }
}

template <class T>
void turn_queries(const CanonicalUpdate& u) {
  const TensorView &given = u.queries, &turned = u.problem.q;
  Writer<T> writer(u, given.shape[3]);
  for (int64_t b = 0; b < given.shape[0]; ++b)
    for (int64_t i = 0; i < given.shape[2]; ++i)
      for (int64_t h = 0; h < given.shape[1]; ++h) {
        const auto at = [&](const TensorView& x) { return b * x.stride[0] + h * x.stride[1] + i * x.stride[2]; };
        const int64_t position = load_integer(u.problem.kv_lens, b) - u.k.shape[2] + i;
        writer.write(given, at(given), turned, at(turned), position, true, 0);
      }
}

}  // namespace

Status attention_kvcache(const CanonicalUpdate& update, const ExecutionOptions& options) try {
  const bool wide = update.problem.q.dtype == DType::kFloat64;
  if (update.queries.present()) wide ? turn_queries<double>(update) : turn_queries<float>(update);
  if (update.k.present()) wide ? append<double>(update) : append<float>(update);
  return attention_forward(update.problem, options);
} catch (const std::bad_alloc&) {
  return {ErrorKind::kMemory, "out of memory"};
}

}  // namespace foveal
