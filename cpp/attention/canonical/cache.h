// What `canonicalize` checks of a cache of keys and values, before and after its own checks. Both throw Rejection.
#pragma once

#include "foveal/attention.h"

namespace foveal {

// Makes a cache of rows one of pages, and the lengths those after the update. The problem is still the caller's.
void check_cache(CanonicalUpdate& update);

// The new tokens and the rotary tables. The problem is canonical; its queries become those that are to be turned.
void check_update(CanonicalUpdate& update);

}  // namespace foveal
