// The device vocabulary of cpp/cuda/device.h carried out on the CPU, so that the kernels' own source runs without a
// GPU.
//
// Every CUDA thread is a fiber. Warp-wide instructions exchange their operands lane by lane, following the fragment
// layouts of the PTX ISA manual; barriers suspend a fiber until its warp or block has arrived. What a GPU would leave
// undefined is made as bad as it can be, to be noticed: runnable fibers are picked at random, shared memory starts as
// NaN, an asynchronous copy leaves NaN in its place until its group is waited for, and misaligned or out-of-range
// shared addresses abort.
//
// Not modelled: speed, bank conflicts, and races between fibers that no interleaving at barriers shows.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "foveal/float16.h"

#define FOVEAL_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace foveal::cuda {

namespace emulation {

struct Words {  // operands of one lane in a warp-wide instruction
  uint32_t word[8];
};

int thread_index();
int block_index();
int grid_size();
char* shared_memory();
void check_shared(uint32_t address, int nbytes, int alignment);
void block_barrier();
bool block_barrier_or(bool flag);
// Publishes this lane's operands and returns those of all 32 lanes; valid until the warp's next exchange but one.
const Words* exchange(const Words& own);
void copy_begin(uint32_t shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int pending);

float widen_half(uint16_t bits);
uint16_t round_half(float value);
uint16_t round_bfloat16(float value);

}  // namespace emulation

inline int thread_index() { return emulation::thread_index(); }
inline int block_index_x() { return emulation::block_index(); }
inline int grid_size_x() { return emulation::grid_size(); }
inline char* shared_memory() { return emulation::shared_memory(); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulation::shared_memory());
}
inline void forget_origin(int64_t&) {}

inline void block_barrier() { emulation::block_barrier(); }
inline bool block_barrier_or(bool flag) { return emulation::block_barrier_or(flag); }
inline void warp_barrier() { emulation::exchange({}); }
inline bool warp_any(bool flag) {
  const emulation::Words* lanes = emulation::exchange({{flag}});
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= lanes[i].word[0] != 0;
  return any;
}

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  emulation::Words own{};
  std::memcpy(own.word, &value, sizeof(T));
  std::memcpy(&value, emulation::exchange(own)[lane & 31].word, sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(T value, int lane_mask) {
  return shuffle(value, (thread_index() & 31) ^ lane_mask);
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  emulation::copy_begin(shared, global, valid);
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::copy_wait(kPending);
}

namespace emulation {
// Matrix `i` of an ldmatrix.x4: the 16-bit element at (row, column), through the address that lane 8i + row gave.
inline uint32_t matrix_element(const Words* lanes, int i, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, shared_memory() + lanes[8 * i + row].word[0] + 2 * column, 2);
  return bits;
}
}  // namespace emulation

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  emulation::check_shared(shared, 16, 16);
  const emulation::Words* lanes = emulation::exchange({{shared}});
  const int group = (thread_index() & 31) / 4, pair = thread_index() & 3;
  for (int i = 0; i < 4; ++i) {
    r[i] = emulation::matrix_element(lanes, i, group, 2 * pair) |
           emulation::matrix_element(lanes, i, group, 2 * pair + 1) << 16;
  }
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  emulation::check_shared(shared, 16, 16);
  const emulation::Words* lanes = emulation::exchange({{shared}});
  const int group = (thread_index() & 31) / 4, pair = thread_index() & 3;
  for (int i = 0; i < 4; ++i) {
    r[i] = emulation::matrix_element(lanes, i, 2 * pair, group) |
           emulation::matrix_element(lanes, i, 2 * pair + 1, group) << 16;
  }
}

inline void shared_store_32(uint32_t shared, uint32_t value) {
  emulation::check_shared(shared, 4, 4);
  std::memcpy(shared_memory() + shared, &value, 4);
}
struct alignas(16) Chunk {
  uint32_t word[4];
};
inline Chunk shared_load_128(uint32_t shared) {
  emulation::check_shared(shared, 16, 16);
  Chunk c;
  std::memcpy(&c, shared_memory() + shared, 16);
  return c;
}

inline float widen(Float16 value) { return emulation::widen_half(value.bits); }
inline float widen(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

template <class Element>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Float16>(float low, float high) {
  return emulation::round_half(low) | static_cast<uint32_t>(emulation::round_half(high)) << 16;
}
template <>
inline uint32_t pack<BFloat16>(float low, float high) {
  return emulation::round_bfloat16(low) | static_cast<uint32_t>(emulation::round_bfloat16(high)) << 16;
}

template <class Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulation::Words* lanes = emulation::exchange({{a[0], a[1], a[2], a[3], b0, b1}});
  const int group = (thread_index() & 31) / 4, pair = thread_index() & 3;
  float row[2][16], column[2][16];  // this lane's two rows of A and two columns of B
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t word_a = lanes[4 * group + k % 8 / 2].word[i + k / 8 * 2];
      const uint32_t word_b = lanes[4 * (2 * pair + i) + k % 8 / 2].word[4 + k / 8];
      row[i][k] = widen(Element{static_cast<uint16_t>(word_a >> 16 * (k % 2))});
      column[i][k] = widen(Element{static_cast<uint16_t>(word_b >> 16 * (k % 2))});
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 4; ++i) d[i] += row[i / 2][k] * column[i % 2][k];
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float maximum(float a, float b) { return a > b || a != a ? a : b; }
inline double maximum(double a, double b) { return a > b || a != a ? a : b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline double logarithm(double x) { return std::log(x); }
inline float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (std::exp2(x * 2.885390081777927f) + 1.0f); }
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

}  // namespace foveal::cuda
