// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four random words that are a
// function of a 128-bit counter and a 64-bit key alone.
//
// Dropout asks for the words of a pair by where it is: so any blocking, any thread and the backward pass meet the same
// mask. Internal linkage, like all that kernel objects include (kernels/kernel_table.cc).
#pragma once

#include <cstdint>

namespace foveal {
namespace {

struct PhiloxWords {
  uint32_t word[4];
};

[[gnu::always_inline]] inline constexpr PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                                           uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The words of keys 4 * (key / 4) .. + 3 of a row; the pair (row, key) has word key % 4.
[[gnu::always_inline]] inline constexpr PhiloxWords dropout_words(uint64_t seed, uint32_t batch, uint32_t head,
                                                                  int64_t row, int64_t key) {
  return philox(static_cast<uint32_t>(key >> 2), static_cast<uint32_t>(row), head, batch, seed);
}

}  // namespace
}  // namespace foveal
