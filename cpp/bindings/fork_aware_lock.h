// A lock for threads that hold it without the GIL. In a forked child it may be held by a thread that is not there: the
// child takes such a lock over and is told so.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace foveal {

class ForkAwareLock {
 public:
  enum class Taken { kFree, kOrphaned, kNot };

  // kNot: a thread of this process holds it.
  Taken try_lock() {
    uint32_t holder = 0;
    if (holder_.compare_exchange_strong(holder, process_, std::memory_order_acquire)) return Taken::kFree;
    if (holder == process_) return Taken::kNot;
    return holder_.compare_exchange_strong(holder, process_, std::memory_order_acquire) ? Taken::kOrphaned
                                                                                        : Taken::kNot;
  }

  // Sleeps until it may be worth another try. Without the GIL.
  void wait() const { holder_.wait(process_, std::memory_order_relaxed); }

  // The release pairs with the acquire of the next holder.
  void unlock() {
    holder_.store(0, std::memory_order_release);
    holder_.notify_one();
  }

  // Once, before the first lock is made.
  static void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { ++process_; });
  }

 private:
  static inline uint32_t process_ = 1;  // how many forks led here; a child is alone when it counts itself
  std::atomic<uint32_t> holder_{0};     // the process of the thread that holds it, or 0
};

}  // namespace foveal
