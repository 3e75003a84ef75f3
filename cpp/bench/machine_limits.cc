// Peak FMA throughput: every accumulator is a chain of dependent FMAs; as many chains as hide the latency (4 or 5
// cycles at two a cycle need 8 to 10) and fit the register file. The registers are named in inline assembly, since a
// compiler that spills one accumulator turns the loop into a measurement of the stack.
//
// Reading: every byte is loaded once, front to back, as the hardware prefetcher likes it.
#include "bench/machine_limits.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "attention/divide_up.h"

namespace foveal {
namespace {

// A loop of FMAs, and the float32 operations in one iteration of it.
struct FmaLoop {
  void (*run)(int64_t iterations);
  int64_t operations;
};

#if defined(__x86_64__) || defined(__aarch64__)
#define FOVEAL_REPEAT_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define FOVEAL_REPEAT_24(X) FOVEAL_REPEAT_12(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)
#endif

#if defined(__x86_64__)

#define FOVEAL_ZMM_FMA(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define FOVEAL_YMM_FMA(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"

__attribute__((target("avx512f"))) void run_avx512(int64_t iterations) {
  asm volatile(
      "vpxord %%zmm30, %%zmm30, %%zmm30\n\t"
      "vpxord %%zmm31, %%zmm31, %%zmm31\n"
      "1:\n\t" FOVEAL_REPEAT_24(FOVEAL_ZMM_FMA) "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(iterations)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm30",
        "xmm31");
}

__attribute__((target("avx2,fma"))) void run_avx2(int64_t iterations) {
  asm volatile(
      "vpxor %%xmm14, %%xmm14, %%xmm14\n\t"
      "vpxor %%xmm15, %%xmm15, %%xmm15\n"
      "1:\n\t" FOVEAL_REPEAT_12(FOVEAL_YMM_FMA) "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(iterations)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm14",
        "xmm15");
}

#elif defined(__aarch64__)

#define FOVEAL_NEON_FMA(i) "fmla v" #i ".4s, v30.4s, v31.4s\n\t"

void run_neon(int64_t iterations) {
  asm volatile(
      "movi v30.4s, #0\n\t"
      "movi v31.4s, #0\n"
      "1:\n\t" FOVEAL_REPEAT_24(FOVEAL_NEON_FMA) "subs %0, %0, #1\n\t"
      "b.ne 1b"
      : "+r"(iterations)
      :
      : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15",
        "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v30", "v31");
}

#endif

// A machine without FMA: a multiplication and an addition, in whatever vectors the compiler makes of them.
void run_plain(int64_t iterations) {
  float chains[48] = {};
  for (int64_t i = 0; i < iterations; ++i) {
    for (float& chain : chains) chain = chain * 0.5f + 1.0f;
  }
  volatile float sink = *std::max_element(chains, chains + 48);
  static_cast<void>(sink);
}

FmaLoop widest_fma_loop() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {run_avx512, 24 * 16 * 2};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {run_avx2, 12 * 8 * 2};
#elif defined(__aarch64__)
  return {run_neon, 24 * 4 * 2};
#endif
  return {run_plain, 48 * 2};
}

constexpr int64_t kBlock = 4096;  // a thread's part is a whole number of these

uint64_t sum_words(const std::byte* data, int64_t nbytes) {
  uint64_t sum = 0;
  for (int64_t i = 0; i + 8 <= nbytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    sum += word;
  }
  return sum;
}

}  // namespace

double run_fmas(int threads, double operations) {
  const FmaLoop loop = widest_fma_loop();
  const auto iterations = std::max<int64_t>(
      1, static_cast<int64_t>(operations / static_cast<double>(threads) / static_cast<double>(loop.operations)));
#pragma omp parallel num_threads(threads)
  loop.run(iterations);
  return static_cast<double>(threads) * static_cast<double>(iterations) * static_cast<double>(loop.operations);
}

void read_bytes(int threads, const void* data, int64_t nbytes) {
  const int64_t blocks = divide_up(nbytes, kBlock);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = blocks * thread / team * kBlock;
    const int64_t end = std::min(blocks * (thread + 1) / team * kBlock, nbytes);
    const uint64_t sum = sum_words(static_cast<const std::byte*>(data) + begin, end - begin);
    asm volatile(
        ""
        :
        : "r"(sum));  // a volatile local that nobody reads does not keep every compiler from skipping the loads
  }
}

}  // namespace foveal
