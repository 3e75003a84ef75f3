// Where sequences begin and end, and where their keys are: integers whose values are judged, on the CPU. Values on
// another device are for its backend to judge.
#include <algorithm>
#include <string>
#include <utility>

#include "attention/canonical/canonicalizer.h"
#include "attention/divide_up.h"
#include "attention/element.h"
#include "attention/rejection.h"

namespace foveal {
namespace {

constexpr int64_t kMaxOffset = int64_t{1} << 59;

template <class Visit>
void for_each_integer(const TensorView& view, Visit visit) {
  if (view.device.type != DeviceType::kCpu) return;
  for (int64_t b = 0; b < view.shape[0]; ++b) {
    const int64_t offset = b * view.stride[0];
    visit(b, view.dtype == DType::kInt32 ? static_cast<const int32_t*>(view.data)[offset]
                                         : static_cast<const int64_t*>(view.data)[offset]);
  }
}

}  // namespace

// Returns the longest length; that of all tokens together where another device has the values.
int64_t Canonicalizer::check_cu_seqlens(const char* name, const TensorView& begins, int64_t total, const char* source) {
  if (begins.rank != 1 || begins.shape[0] < 1) reject_shape(name, begins, "(B + 1,)");
  if (begins.shape[0] != p_.cu_seqlens_q.shape[0]) {
    reject_shape(name, begins, text_of(p_.cu_seqlens_q.shape, 1) + " (from cu_seqlens_q)");
  }
  scores_[0] = begins.shape[0] - 1;
  if (begins.device.type != DeviceType::kCpu) return total;
  int64_t before = 0, longest = 0;
  for_each_integer(begins, [&](int64_t b, int64_t begin) {
    if (begin < before || begin > total) {
      const std::string found = std::string(name) + "[" + std::to_string(b) + "]" + is_integer(begin);
      if (begin > total)
        reject_value(found + ", expected at most " + std::to_string(total) + " (" + source + ".shape[0])");
      reject_value(found + ", expected at least " + std::to_string(before) +
                   (b == 0 ? "" : " (" + std::string(name) + "[" + std::to_string(b - 1) + "])"));
    }
    if (b > 0) longest = std::max(longest, begin - before);
    before = begin;
  });
  return longest;
}

void Canonicalizer::check_lens(const char* name, const TensorView& lens, int64_t seqlen, const char* source) const {
  if (!lens.present()) return;
  if (lens.rank != 1 || lens.shape[0] != scores_[0]) reject_shape(name, lens, "(B,) = " + text_of(scores_, 1));
  const bool in_pages = &lens == &p_.kv_lens && p_.paged();
  for_each_integer(lens, [&](int64_t b, int64_t len) {
    if (len >= 0 && len <= seqlen) return;
    reject_value(std::string(name) + "[" + std::to_string(b) + "]" + is_integer(len) + ", expected 0 to " +
                 std::to_string(seqlen) + " (" +
                 (in_pages
                      ? "block_table.shape[1] * page size"
                      : std::string(source) + ".shape[" + std::to_string(position_of(kSeq, rank_, layout_)) + "]") +
                 ")");
  });
}

void Canonicalizer::check_block_table() const {
  const TensorView& table = p_.block_table;
  const int64_t page_size = p_.k.shape[kSeq], num_pages = p_.k.shape[kBatch];
  const int64_t judged = table.device.type == DeviceType::kCpu ? table.shape[0] : 0;
  for (int64_t b = 0; b < judged; ++b) {
    const int64_t used = divide_up(load_integer(p_.kv_lens, b), std::max<int64_t>(page_size, 1));
    for (int64_t x = 0; x < used; ++x) {
      const int64_t page = integer_at(table, b * table.stride[0] + x * table.stride[1]);
      if (page >= 0 && page < num_pages) continue;
      reject_value("block_table[" + std::to_string(b) + ", " + std::to_string(x) + "]" + is_integer(page) +
                   ", expected 0 to " + std::to_string(num_pages - 1) + " (" + names_.k + ".shape[0] is " +
                   std::to_string(num_pages) + ")");
    }
  }
  for (const auto& [name, scale] : {std::pair("k_scale", &p_.k_scale), std::pair("v_scale", &p_.v_scale)})
    if (scale->present() && (scale->rank != 2 || !std::equal(scale->shape, scale->shape + 2, p_.k.shape)))
      reject_shape(name, *scale, "(pages, Hkv) = " + text_of(p_.k.shape, 2));
}

void Canonicalizer::rewrite_q_offset() {
  TensorView& offset = p_.q_offset;
  if (!offset.present()) return;
  if (offset.rank == 0) {
    offset.rank = 1;
    offset.shape[0] = scores_[0];
    offset.stride[0] = 0;
  }
  if (offset.rank != 1 || offset.shape[0] != scores_[0]) {
    reject_shape("q_offset", offset, "an integer or (B,) = " + text_of(scores_, 1));
  }
  for_each_integer(offset, [](int64_t b, int64_t value) {
    if (value >= -kMaxOffset && value <= kMaxOffset) return;
    reject_value("q_offset[" + std::to_string(b) + "]" + is_integer(value) + ", expected -2^59 to 2^59");
  });
}

}  // namespace foveal
