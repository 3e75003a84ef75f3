#include "attention/threads.h"

#include <omp.h>

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace foveal {
namespace {

constexpr int kMaxThreads = 4096;  // above it, a mistyped number

// relaxed: a count on its own, nothing is published with it.
std::atomic<int> chosen_count{0};

// FOVEAL_NUM_THREADS: 0 when unset or empty, -1 when it is no count.
int environment_count() {
  const char* text = std::getenv("FOVEAL_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  int count = 0;
  const char* end = text + std::strlen(text);
  const auto [parsed, error] = std::from_chars(text, end, count);
  return error == std::errc{} && parsed == end && count >= 1 && count <= kMaxThreads ? count : -1;
}

}  // namespace

void set_num_threads(int count) { chosen_count.store(count, std::memory_order_relaxed); }

int num_threads(int framework_count, Status& status) {
  const int chosen = chosen_count.load(std::memory_order_relaxed);
  if (chosen > 0) return chosen;
  static const int from_environment = environment_count();
  if (from_environment < 0) {
    status = {ErrorKind::kValue, "FOVEAL_NUM_THREADS is '" + std::string(std::getenv("FOVEAL_NUM_THREADS")) +
                                     "', expected an integer from 1 to " + std::to_string(kMaxThreads)};
    return 1;
  }
  if (from_environment > 0) return from_environment;
  return framework_count > 0 ? framework_count : omp_get_max_threads();
}

}  // namespace foveal
