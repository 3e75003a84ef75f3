// Whether strided arrays share memory: the question to ask before a kernel writes.
//
// Exact answers need an integer programme (NumPy's shares_memory); these tests are cheap and err towards "yes". They
// are exact for separate buffers and for the slices of one buffer that a common period tells apart, such as q and out
// in a packed (B,S,4,H,D) array.
#pragma once

#include "foveal/tensor_view.h"

namespace foveal {

// Two elements of one array at the same address, or too interleaved to rule it out.
bool may_overlap_itself(const TensorView& view);

bool may_overlap(const TensorView& a, const TensorView& b);

}  // namespace foveal
