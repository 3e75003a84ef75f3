// The device vocabulary: the few instructions and indices that the CUDA kernels are written in.
//
// Kernels include this header and no CUDA header, so that the same kernel source also compiles against
// tests/cpp/cuda_emulation/cuda/device.h, which carries these names out on the CPU, lane by lane, from the fragment
// layouts of the PTX ISA manual. Everything here is sm_80.
//
// Fragment layouts (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane = 4*group + pair:
//   A 16x16  a[0] (group, 2*pair..+1)      a[1] (group+8, 2*pair..+1)   a[2], a[3] the same rows, columns + 8
//   B 16x8   b[0] (2*pair..+1, group)      b[1] (2*pair+8..+9, group)   rows are k, columns are n
//   D 16x8   d[0], d[1] (group, 2*pair..+1)     d[2], d[3] (group+8, 2*pair..+1)
// A 32-bit register holds two 16-bit elements, the lower index in the lower half.
#pragma once

#include <cstdint>

#include "foveal/float16.h"

#define FOVEAL_DEVICE __device__ __forceinline__

namespace foveal::cuda {

FOVEAL_DEVICE int thread_index() { return threadIdx.x; }
FOVEAL_DEVICE int block_index_x() { return blockIdx.x; }
FOVEAL_DEVICE int grid_size_x() { return gridDim.x; }

// The block's dynamic shared memory, aligned for the widest swizzle.
FOVEAL_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

// The address that shared-memory instructions take.
FOVEAL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Hides where a value comes from, so that the compiler does not carry multiples of it through a loop in registers that
// the accumulators need.
FOVEAL_DEVICE void forget_origin(int64_t& value) { asm volatile("" : "+l"(value)); }

FOVEAL_DEVICE void block_barrier() { __syncthreads(); }
FOVEAL_DEVICE bool block_barrier_or(bool flag) { return __syncthreads_or(flag); }
FOVEAL_DEVICE void warp_barrier() { __syncwarp(); }
FOVEAL_DEVICE bool warp_any(bool flag) { return __any_sync(0xffffffffu, flag); }

template <class T>
FOVEAL_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <class T>
FOVEAL_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// 16 bytes from global to shared memory without passing through registers; zeros when not `valid` (nothing is read
// then).
FOVEAL_DEVICE void cp_async_16(uint32_t shared, const void* global, bool valid) {
  const int nbytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(nbytes)
               : "memory");
}
FOVEAL_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's newest groups are under way.
template <int kPending>
FOVEAL_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8*i..8*i+7 give the row addresses of matrix i.
FOVEAL_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
FOVEAL_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

FOVEAL_DEVICE void shared_store_32(uint32_t shared, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}
struct alignas(16) Chunk {  // 16 bytes, the unit of every global and shared transfer
  uint32_t word[4];
};
FOVEAL_DEVICE Chunk shared_load_128(uint32_t shared) {
  Chunk c;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
               : "r"(shared)
               : "memory");
  return c;
}

// d += a b, products of 16-bit elements accumulated in float.
template <class Element>
FOVEAL_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FOVEAL_DEVICE void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FOVEAL_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even, `low` in the lower half.
template <class Element>
FOVEAL_DEVICE uint32_t pack(float low, float high);
template <>
FOVEAL_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
FOVEAL_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

FOVEAL_DEVICE float widen(Float16 value) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(value.bits));
  return r;
}
FOVEAL_DEVICE float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// 2^x and log2 x by the special-function unit: about 2 ulp, exp2 of -inf is 0.
FOVEAL_DEVICE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
FOVEAL_DEVICE float log2_approx(float x) { return __log2f(x); }

// NaN if either is NaN, so that a NaN score reaches its row's result.
FOVEAL_DEVICE float maximum(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
FOVEAL_DEVICE double maximum(double a, double b) { return a > b || a != a ? a : b; }
FOVEAL_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FOVEAL_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
FOVEAL_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// Accurate to 1-2 ulp, for the plain path.
FOVEAL_DEVICE float exponential(float x) { return expf(x); }
FOVEAL_DEVICE double exponential(double x) { return exp(x); }
FOVEAL_DEVICE float logarithm(float x) { return logf(x); }
FOVEAL_DEVICE double logarithm(double x) { return log(x); }
// 1 - 2 / (e^2x + 1): absolute error about 2e-7, saturates without a branch.
FOVEAL_DEVICE float hyperbolic_tangent(float x) {
  return 1.0f - __fdividef(2.0f, exp2_approx(x * 2.885390081777927f) + 1.0f);
}
FOVEAL_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

}  // namespace foveal::cuda
