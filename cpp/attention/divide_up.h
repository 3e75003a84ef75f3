// How many pieces of one size cover another. For host code: kernels are compiled for several instruction sets and keep
// their own arithmetic.
#pragma once

#include <cstdint>

namespace foveal {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0, b > 0

}  // namespace foveal
