// How a refused argument is reported: the exception inside the core, and the one wording of its text,
//
//   <argument and what was found>, expected <what would do>
//
// Status::message puts the function before it. Every text is built here or from these pieces, and only when something
// is refused.
#pragma once

#include <string>

#include "foveal/attention.h"

namespace foveal {

// Thrown by checks; an entry point catches it and returns its Status.
struct Rejection {
  Status status;
};

// " is 7". The ends of int64_t stand for whatever is beyond them, as bindings have it.
std::string is_integer(int64_t value);

[[noreturn]] void reject_type(const std::string& text);
[[noreturn]] void reject_value(const std::string& text);

// "mask has dtype int32, expected bool"
[[noreturn]] void reject_dtype(const std::string& name, DType found, const std::string& expected);
// "sinks has shape (3,), expected (4,)"
[[noreturn]] void reject_shape(const std::string& name, const TensorView& view, const std::string& expected);

std::string text_of(double value);
std::string text_of(Device device);
std::string text_of(const int64_t* shape, int rank);
std::string dimensions(int rank);                                             // "1 dimension", "2 dimensions"
std::string extent_found(const std::string& name, int axis, int64_t extent);  // "k.shape[3] is 96"

}  // namespace foveal
