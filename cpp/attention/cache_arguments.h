// What `canonicalize` checks of a cache of keys and values, before and after its own checks. Both throw Rejection.
#pragma once

#include "foveal/attention.h"

namespace foveal {

// Makes a cache of rows one of pages, and the lengths those after the update. The problem is the caller's.
void check_cache(AttentionProblem& problem, CacheUpdate& update);

// The new tokens and the rotary tables. The problem is canonical.
void check_update(AttentionProblem& problem, CacheUpdate& update);

}  // namespace foveal
