// The few assertions that the C++ tests need. A failed check prints where and what, and the test goes on; main ends
// with `return foveal_test::result();`. Checks may run in any thread.
#pragma once

#include <atomic>
#include <cstdio>
#include <sstream>
#include <string>

namespace foveal_test {

inline std::atomic<int> failures{0};

inline void fail(const char* file, int line, const std::string& what) {
  if (failures.fetch_add(1, std::memory_order_relaxed) < 20) {  // relaxed: a count, read after the threads are joined
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  }
}

template <typename T>
std::string shown(const T& value) {
  std::ostringstream stream;
  stream.precision(17);
  stream << value;
  return stream.str();
}

inline int result() {
  const int count = failures.load(std::memory_order_relaxed);
  if (count != 0) std::fprintf(stderr, "%d checks failed\n", count);
  return count == 0 ? 0 : 1;
}

}  // namespace foveal_test

#define FOVEAL_CHECK(condition)                                                       \
  do {                                                                                \
    if (!(condition)) foveal_test::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (0)

#define FOVEAL_CHECK_EQ(found, expected)                                                                         \
  do {                                                                                                           \
    const auto& found_value = (found);                                                                           \
    const auto& expected_value = (expected);                                                                     \
    if (!(found_value == expected_value)) {                                                                      \
      foveal_test::fail(                                                                                         \
          __FILE__, __LINE__,                                                                                    \
          #found " is " + foveal_test::shown(found_value) + ", expected " + foveal_test::shown(expected_value)); \
    }                                                                                                            \
  } while (0)
