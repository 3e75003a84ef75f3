// Working memory of one call: aligned to cache lines, freed by itself.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "attention/divide_up.h"

namespace foveal {

struct FreeScratch {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<std::byte, FreeScratch>;

// Null when there is no memory.
inline Scratch allocate_scratch(int64_t nbytes) {
  constexpr size_t kAlignment = 64;
  const size_t rounded = static_cast<size_t>(divide_up(nbytes, kAlignment)) * kAlignment;
  return Scratch(static_cast<std::byte*>(std::aligned_alloc(kAlignment, std::max(rounded, kAlignment))));
}

}  // namespace foveal
