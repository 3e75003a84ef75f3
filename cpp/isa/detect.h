// Which instruction sets this build holds, which this machine can run, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "foveal/attention.h"

namespace foveal {

// Names of the built tables that this machine can run, best first; "scalar" is always among them.
std::vector<std::string> available_isas();

// The table of that name; null when it is not built or cannot run here.
const KernelTable* find_table(const std::string& name);

// The table in use: FOVEAL_ISA when set, else the best. Sets `status` to kValue, listing the choices, for an unknown or
// unavailable name.
const KernelTable* active_table(Status& status);

const char* table_name(const KernelTable* table);

}  // namespace foveal
