// Reading optional operands whose dtype and strides are known at run time only: one element at a time.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace foveal::cuda {

FOVEAL_DEVICE int64_t offset_of(const Array& a, int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) {
  return i0 * a.stride[0] + i1 * a.stride[1] + i2 * a.stride[2] + i3 * a.stride[3];
}

template <class Real>
FOVEAL_DEVICE Real read_real(const Array& a, int64_t offset) {
  switch (a.dtype) {
    case DType::kFloat32:
      return static_cast<Real>(static_cast<const float*>(a.data)[offset]);
    case DType::kFloat64:
      return static_cast<Real>(static_cast<const double*>(a.data)[offset]);
    case DType::kFloat16:
      return static_cast<Real>(widen(static_cast<const Float16*>(a.data)[offset]));
    case DType::kBFloat16:
      return static_cast<Real>(widen(static_cast<const BFloat16*>(a.data)[offset]));
    default:
      return Real(0);
  }
}

template <class Real>
FOVEAL_DEVICE void write_real(const Array& a, int64_t offset, Real value) {
  switch (a.dtype) {
    case DType::kFloat32:
      static_cast<float*>(a.data)[offset] = static_cast<float>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(a.data)[offset] = static_cast<double>(value);
      break;
    case DType::kFloat16:
      static_cast<Float16*>(a.data)[offset].bits =
          static_cast<uint16_t>(pack<Float16>(static_cast<float>(value), 0.0f));
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(a.data)[offset].bits =
          static_cast<uint16_t>(pack<BFloat16>(static_cast<float>(value), 0.0f));
      break;
    default:
      break;
  }
}

// An int32 or int64 operand clamped to [low, high]. Values live on the device, so a length beyond its array cannot
// raise without a synchronisation: it is cut to what the array holds.
FOVEAL_DEVICE int read_clamped(const Array& a, int64_t offset, int low, int high) {
  const int64_t value = a.dtype == DType::kInt64 ? static_cast<const int64_t*>(a.data)[offset]
                                                 : static_cast<const int32_t*>(a.data)[offset];
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

// Where key (or value) `key` of a kv head begins: in a row of its own batch element, or in a page. A page that the
// cache does not have is cut to one that it has.
FOVEAL_DEVICE int64_t key_offset(const Params& p, const Array& a, int batch, int kv_head, int key) {
  if (p.block_table.data == nullptr) return offset_of(a, batch, kv_head, key);
  const int64_t entry = offset_of(p.block_table, batch, key / p.page_size);
  return offset_of(a, read_clamped(p.block_table, entry, 0, p.num_pages - 1), kv_head, key % p.page_size);
}

}  // namespace foveal::cuda
