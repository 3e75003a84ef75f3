#include "isa/detect.h"

#include <atomic>
#include <cstdlib>

#include "isa/kernel_table.h"

namespace foveal {

extern const KernelTable kTable_scalar;
#ifdef FOVEAL_HAVE_avx2
extern const KernelTable kTable_avx2;
#endif
#ifdef FOVEAL_HAVE_avx512
extern const KernelTable kTable_avx512;
#endif
#ifdef FOVEAL_HAVE_avx512bf16
extern const KernelTable kTable_avx512bf16;
#endif
#ifdef FOVEAL_HAVE_neon
extern const KernelTable kTable_neon;
#endif

namespace {

// Best first.
const std::vector<const KernelTable*>& runnable_tables() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#ifdef FOVEAL_EMULATE_AVX512
    found.push_back(&kTable_avx512bf16);
    found.push_back(&kTable_avx512);
#else
#ifdef FOVEAL_HAVE_avx512bf16
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      found.push_back(&kTable_avx512bf16);
#endif
#ifdef FOVEAL_HAVE_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
      found.push_back(&kTable_avx512);
#endif
#endif  // FOVEAL_EMULATE_AVX512
#ifdef FOVEAL_HAVE_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      found.push_back(&kTable_avx2);
#endif
#ifdef FOVEAL_HAVE_neon
    found.push_back(&kTable_neon);  // part of every 64-bit Arm
#endif
    found.push_back(&kTable_scalar);
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
  status = {ErrorKind::kValue, source + " is '" + name + "', expected one of: " + choices};
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
