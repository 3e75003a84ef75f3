// The two 16-bit floating types as they are stored: bits without arithmetic of their own. Every vocabulary (cpp/simd,
// cpp/cuda/device.h and its emulation) says how it widens and rounds them.
#pragma once

#include <cstdint>

namespace foveal {

struct Float16 {  // IEEE 754 binary16
  uint16_t bits;
};
struct BFloat16 {  // the upper half of a float32
  uint16_t bits;
};

}  // namespace foveal
