// Measures IndexedHeap against the queues of heap_peers.h: random updates, a mix of 15 updates to 1 pop and push, and
// pop and push alone, on one thread and on several, after checking that each queue pops a sorted sequence.
//
//   heap_bench [--seconds S] [--rounds N] [--threads T] [--size N]...
//
// Every round runs all contenders in turn; the tables show the median over rounds in nanoseconds per operation (wall
// time over all operations of all threads) and, beside a contender, the median over rounds of its time over ours, with
// the quartiles. A pop and push counts as one operation.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "heap_peers.h"

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

double now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

class Random {  // xorshift64*
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15 + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1D;
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

void pin(unsigned cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu % std::max(1u, std::thread::hardware_concurrency()), &set);
  sched_setaffinity(0, sizeof set, &set);
#else
  (void)cpu;
#endif
}

enum class Work { kUpdate, kMix, kPopPush };
constexpr const char* kWorkName[] = {"random update", "15 updates : 1 pop+push", "pop+push"};

struct Options {
  double seconds = 0.1;
  int rounds = 7;
  unsigned threads = std::max(2u, std::thread::hardware_concurrency());
  std::vector<int64_t> sizes;
};

struct Data {
  explicit Data(int64_t n) : ids(n), priorities(n) {
    std::iota(ids.begin(), ids.end(), 0);
    Random random(42);
    for (double& priority : priorities) priority = random.uniform();
  }
  std::vector<int64_t> ids;
  std::vector<double> priorities;
};

template <class Queue>
uint64_t work_until(Queue& queue, int64_t n, Work work, uint64_t seed, const std::atomic<bool>& stop) {
  Random random(seed);
  uint64_t count = 0;
  while (!stop.load(std::memory_order_relaxed)) {
    for (int i = 0; i < 64; ++i, ++count) {
      if (work == Work::kUpdate || (work == Work::kMix && count % 16 != 15)) {
        queue.update(static_cast<int64_t>(random.next() % static_cast<uint64_t>(n)), random.uniform());
        continue;
      }
      int64_t id;
      double priority;
      if (!queue.pop(id, priority)) continue;
      // The hold model: what comes back is later than what left.
      queue.push(id, work == Work::kPopPush ? priority + random.uniform() : random.uniform());
    }
  }
  return count;
}

// Nanoseconds of wall time an operation.
template <class Queue>
double measure(const Data& data, Work work, unsigned threads, double seconds) {
  const int64_t n = static_cast<int64_t>(data.ids.size());
  Queue queue(n);
  queue.build(data.ids, data.priorities);
  std::atomic<unsigned> ready{0};
  std::atomic<bool> go{false}, stop{false};
  std::vector<uint64_t> counts(threads);
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      pin(t);
      ++ready;
      while (!go) std::this_thread::yield();
      counts[t] = work_until(queue, n, work, t + 1, stop);
    });
  }
  while (ready < threads) std::this_thread::yield();
  const double start = now();
  go = true;
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  stop = true;
  for (std::thread& thread : pool) thread.join();
  const double elapsed = now() - start;
  return elapsed * 1e9 / static_cast<double>(std::accumulate(counts.begin(), counts.end(), uint64_t{0}));
}

// The contender must hold what it was given, in order, after some updates.
template <class Queue>
bool check(bool in_order) {
  const Data data(3000);
  Queue queue(3000);
  queue.build(data.ids, data.priorities);
  std::vector<double> model = data.priorities;
  Random random(7);
  for (int i = 0; i < 20 * 256; ++i) {  // whole batches
    const int64_t id = static_cast<int64_t>(random.next() % 3000);
    queue.update(id, model[id] = random.uniform());
  }
  double last = -1;
  int64_t id;
  double priority;
  for (int i = 0; i < 3000; ++i) {
    if (!queue.pop(id, priority) || model[id] != priority || (in_order && priority < last)) return false;
    last = priority;
    model[id] = -1;
  }
  return !queue.pop(id, priority);
}

struct Contender {
  const char* name;
  std::function<double(const Data&, Work, unsigned, double)> measure;
  std::function<bool()> check;
  bool threads;              // may several threads use it
  std::optional<Work> only;  // the one work in which it differs from another contender, or makes sense
};

template <class Queue>
Contender contender(const char* name, bool threads = true, std::optional<Work> only = {}, bool in_order = true) {
  return {name, measure<Queue>, [in_order] { return check<Queue>(in_order); }, threads, only};
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

void compare(const std::vector<Contender>& contenders, const Data& data, Work work, unsigned threads,
             const Options& options) {
  std::vector<std::vector<double>> times(contenders.size());
  const auto takes_part = [&](const Contender& c) {
    return (threads == 1 || c.threads) && (!c.only || *c.only == work);
  };
  for (int round = 0; round < options.rounds; ++round) {
    for (size_t i = 0; i < contenders.size(); ++i) {
      if (takes_part(contenders[i])) times[i].push_back(contenders[i].measure(data, work, threads, options.seconds));
    }
  }
  std::printf("\n%s, %zu elements, %u thread%s\n", kWorkName[static_cast<int>(work)], data.ids.size(), threads,
              threads == 1 ? "" : "s");
  for (size_t i = 0; i < contenders.size(); ++i) {
    if (times[i].empty()) continue;
    std::printf("  %-36s %8.1f ns", contenders[i].name, quantile(times[i], 0.5));
    if (i > 0) {
      std::vector<double> ratios;
      for (int round = 0; round < options.rounds; ++round) ratios.push_back(times[i][round] / times[0][round]);
      std::printf("   %5.2f x ours (%.2f to %.2f)", quantile(ratios, 0.5), quantile(ratios, 0.25),
                  quantile(ratios, 0.75));
    }
    std::printf("\n");
  }
  std::fflush(stdout);
}

int run(const Options& options) {
  const std::vector<Contender> contenders = {
      contender<Lockfree<false>>("IndexedHeap"),
      contender<Lockfree<true>>("IndexedHeap, relaxed pop", true, Work::kPopPush, false),
      contender<Batched>("IndexedHeap, update_many of 256", true, Work::kUpdate),
      contender<Sequential>("4-ary heap", false),
      contender<Locked<std::mutex>>("4-ary heap under a mutex"),
      contender<Locked<Spinlock>>("4-ary heap under a spinlock"),
#if FOVEAL_BENCH_TBB
      contender<Tbb>("oneTBB concurrent_priority_queue", true, Work::kPopPush),
#endif
  };
  for (const Contender& c : contenders) {
    if (!c.check()) {
      std::fprintf(stderr, "heap_bench: %s popped a wrong sequence\n", c.name);
      return 1;
    }
  }
  std::printf("median of %d interleaved rounds of %.2f s\n", options.rounds, options.seconds);
  for (const int64_t size : options.sizes) {
    const Data data(size);
    for (const Work work : {Work::kUpdate, Work::kMix, Work::kPopPush}) {
      for (const unsigned threads : {1u, options.threads}) compare(contenders, data, work, threads, options);
    }
  }
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--seconds")
      options.seconds = std::atof(argv[i + 1]);
    else if (name == "--rounds")
      options.rounds = std::atoi(argv[i + 1]);
    else if (name == "--threads")
      options.threads = static_cast<unsigned>(std::atoi(argv[i + 1]));
    else if (name == "--size")
      options.sizes.push_back(std::atoll(argv[i + 1]));
    else
      return std::fprintf(stderr, "heap_bench: unknown option %s\n", argv[i]), 2;
  }
  if (argc % 2 == 0) return std::fprintf(stderr, "heap_bench: %s has no value\n", argv[argc - 1]), 2;
  if (options.sizes.empty()) options.sizes = {1000, 100'000, 1'000'000};
  return bench::run(options);
}
