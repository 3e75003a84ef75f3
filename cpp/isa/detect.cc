#include "isa/detect.h"

#include <atomic>
#include <cstdlib>

#include "isa/isa_list.h"
#include "kernels/kernel_table.h"

namespace foveal {

#define FOVEAL_DECLARE_TABLE(name, runs_here) extern const KernelTable kTable_##name;
FOVEAL_ISAS(FOVEAL_DECLARE_TABLE)
#undef FOVEAL_DECLARE_TABLE

namespace {

// Best first.
const std::vector<const KernelTable*>& runnable_tables() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define FOVEAL_ADD_TABLE(name, runs_here) \
  if (runs_here) found.push_back(&kTable_##name);
    FOVEAL_ISAS(FOVEAL_ADD_TABLE)
#undef FOVEAL_ADD_TABLE
    return found;
  }();
  return tables;
}

// relaxed: it points to a constant.
std::atomic<const KernelTable*> chosen_table{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : runnable_tables()) names.emplace_back(table->name);
  return names;
}

const KernelTable* find_table(const std::string& name) {
  for (const KernelTable* table : runnable_tables())
    if (name == table->name) return table;
  return nullptr;
}

const KernelTable* require_table(const std::string& name, const std::string& source, Status& status) {
  if (const KernelTable* table = find_table(name)) return table;
  std::string choices;
  for (const std::string& available : available_isas()) choices += (choices.empty() ? "" : ", ") + available;
  status = {ErrorKind::kValue, source + " is '" + name + "', expected one of: " + choices, nullptr};
  return nullptr;
}

const KernelTable* active_table(Status& status) {
  if (const KernelTable* table = chosen_table.load(std::memory_order_relaxed)) return table;
  static const char* const forced = std::getenv("FOVEAL_ISA");
  if (forced == nullptr || *forced == '\0') return runnable_tables().front();
  return require_table(forced, "FOVEAL_ISA", status);
}

void use_table(const KernelTable* table) { chosen_table.store(table, std::memory_order_relaxed); }

const char* table_name(const KernelTable* table) { return table->name; }

}  // namespace foveal
