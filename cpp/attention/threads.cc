#include "attention/threads.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>

namespace foveal {
namespace {

// Above it, a mistyped number: libgomp ends the process when the system has no more threads to give.
constexpr int kMaxThreads = 4096;
constexpr double kFlopsWorthAThread = 1e6;  // about 10 microseconds: what waking a sleeping team costs

constexpr double kFlopsWorthAPoll = 1e7;  // what no machine takes kPollEvery for; to look at a clock takes time too
constexpr auto kPollEvery = std::chrono::milliseconds(50);

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
  status = {
      ErrorKind::kValue,
      "FOVEAL_NUM_THREADS is '" + std::string(text) + "', expected an integer from 1 to " + std::to_string(kMaxThreads),
      nullptr};
  return kUnread;
}

// libgomp's pool does not survive fork: a child whose parent ran a parallel region would wait for it for ever.
std::atomic<bool> in_forked_child{false};

const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });

// Threads that calls from other host threads keep busy; a call takes what is left, so that n callers do not start n
// teams.
std::atomic<int> busy_threads{0};

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

Team::Team(const ExecutionOptions& options, int64_t items, double flops)
    : options_(options), polls_(options.interrupted != nullptr && flops >= kFlopsWorthAPoll) {
  if (polls_) last_poll_ = std::chrono::steady_clock::now();
  const int wanted = options.num_threads;
  const double worthwhile = std::min(static_cast<double>(items), flops / kFlopsWorthAThread);
  const int useful = worthwhile < 2 || fork_handler != 0 || in_forked_child.load(std::memory_order_relaxed)
                         ? 1
                         : static_cast<int>(std::min<double>(wanted, worthwhile));
  const int busy = busy_threads.fetch_add(useful, std::memory_order_relaxed);
  size_ = std::clamp(wanted - busy, 1, useful);
  busy_threads.fetch_sub(useful - size_, std::memory_order_relaxed);
}

Team::~Team() { busy_threads.fetch_sub(size_, std::memory_order_relaxed); }

void Team::poll(int thread) {
  if (thread != 0 || !polls_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_poll_ < kPollEvery) return;
  last_poll_ = now;
  const bool stop = options_.interrupted(options_.interrupted_context);
  if (size_ > 1 && in_forked_child.load(std::memory_order_relaxed)) _longjmp(outside_, 1);
  if (stop) stop_.store(true, std::memory_order_relaxed);
}

}  // namespace foveal
