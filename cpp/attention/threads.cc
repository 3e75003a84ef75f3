#include "attention/threads.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace foveal {
namespace {

// Above it, a mistyped number: libgomp ends the process when the system has no more threads to give.
constexpr int kMaxThreads = 4096;

// relaxed: a count on its own, nothing is published with it.
std::atomic<int> chosen_count{0};

// What FOVEAL_NUM_THREADS said when it was first read without complaint; 0: nothing. relaxed: see above.
constexpr int kUnread = -1;
std::atomic<int> environment_count{kUnread};

int read_environment(Status& status) {
  const char* text = std::getenv("FOVEAL_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  int count = 0;
  const char* end = text + std::strlen(text);
  const auto [parsed, error] = std::from_chars(text, end, count);
  if (error == std::errc{} && parsed == end && count >= 1 && count <= kMaxThreads) return count;
  status = {ErrorKind::kValue, "FOVEAL_NUM_THREADS is '" + std::string(text) + "', expected an integer from 1 to " +
                                   std::to_string(kMaxThreads)};
  return kUnread;
}

}  // namespace

void set_num_threads(int count) { chosen_count.store(count, std::memory_order_relaxed); }

int num_threads(int framework_count, Status& status) {
  const int chosen = chosen_count.load(std::memory_order_relaxed);
  if (chosen > 0) return chosen;
  int count = environment_count.load(std::memory_order_relaxed);
  if (count == kUnread) {
    count = read_environment(status);
    if (count == kUnread) return 1;
    environment_count.store(count, std::memory_order_relaxed);
  }
  if (count == 0) count = framework_count > 0 ? framework_count : omp_get_max_threads();
  if (count < 1) count = omp_get_num_procs();  // an OMP_NUM_THREADS beyond int, which wrapped
  return std::clamp(count, 1, kMaxThreads);
}

}  // namespace foveal
