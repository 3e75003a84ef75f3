// The heap's three headers alone, without the rest of foveal: two threads share a queue of jobs whose urgency changes.
//
//   c++ -std=c++20 -O2 -Icpp/include examples/heap_from_cpp.cc -pthread -o heap_from_cpp && ./heap_from_cpp
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "foveal/indexed_heap.h"

int main() {
  constexpr int64_t kJobs = 1000;
  foveal::IndexedHeap heap(kJobs, foveal::Order::kMax);  // ids 0 to 999, most urgent first
  std::vector<std::string> payload(kJobs);

  std::thread producer([&] {
    for (int64_t id = 0; id < kJobs; ++id) {
      payload[id] = "job " + std::to_string(id);     // plain memory: whoever pops the id sees what was written before
      heap.push(id, static_cast<double>(id % 100));  // false if the id were in the heap already
    }
    for (int64_t id = 0; id < kJobs; id += 7) heap.update(id, 1000.0);  // false if it has been popped
  });

  int64_t done = 0;
  uint64_t letters = 0;
  while (done < kJobs) {
    const auto first = heap.pop();  // an id and its priority, or nothing
    if (!first) continue;
    letters += payload[first->id].size();
    ++done;
  }
  producer.join();
  std::printf("%lld jobs, %llu letters, %lld left\n", static_cast<long long>(done),
              static_cast<unsigned long long>(letters), static_cast<long long>(heap.size()));
  return done == kJobs && heap.size() == 0 ? 0 : 1;
}
