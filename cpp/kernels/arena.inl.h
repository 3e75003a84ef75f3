// How kernels cut up what they work on: blocks of keys, and one aligned block of scratch memory.
#pragma once

#include "simd/vectors.h"

namespace foveal {
namespace {

constexpr int64_t kKeyBlock = 128;  // keys a block; blocks begin at multiples of it, whatever range is asked for

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch is handed out from its front.
template <class T>
struct Arena {
  T* next;

  FOVEAL_INLINE T* take(int64_t n) {
    T* p = next;
    next += round_up(n, 64 / static_cast<int64_t>(sizeof(T)));
    return p;
  }
};

}  // namespace
}  // namespace foveal
