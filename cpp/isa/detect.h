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

// The same, and a `status` of kValue that says what `source` asked for and lists the choices.
const KernelTable* require_table(const std::string& name, const std::string& source, Status& status);

// The table in use: that of `use_table`, else FOVEAL_ISA when set, else the best. Sets `status` to kValue, listing the
// choices, for an unknown or unavailable name.
const KernelTable* active_table(Status& status);

// Makes a table the one in use from now on, so that tests can run each; null: back to FOVEAL_ISA.
void use_table(const KernelTable* table);

const char* table_name(const KernelTable* table);

}  // namespace foveal
