// Selects the instruction set at run time and forwards every op to its kernels.
#include <atomic>
#include <stdexcept>

#include "cpu/kernel_table.h"
#include "deco/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace deco::cpu {

#define DECO_DECLARE_TABLE(isa)    \
  namespace isa {                  \
  extern const KernelTable kTable; \
  }
DECO_DECLARE_TABLE(portable)
#ifdef DECO_HAVE_ISA_avx2
DECO_DECLARE_TABLE(avx2)
#endif
#ifdef DECO_HAVE_ISA_avx512
DECO_DECLARE_TABLE(avx512)
#endif
#ifdef DECO_HAVE_ISA_avx512bf16
DECO_DECLARE_TABLE(avx512bf16)
#endif
#ifdef DECO_HAVE_ISA_amx
DECO_DECLARE_TABLE(amx)
#endif
#ifdef DECO_HAVE_ISA_neon
DECO_DECLARE_TABLE(neon)
#endif
#ifdef DECO_HAVE_ISA_neonbf16
DECO_DECLARE_TABLE(neonbf16)
#endif
#undef DECO_DECLARE_TABLE

namespace {

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx_bf16 = false, amx = false;
  bool neon = false, neonbf16 = false;
};

#if defined(__x86_64__)
struct CpuidRegisters {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidRegisters cpuid(unsigned leaf, unsigned subleaf) {
  CpuidRegisters r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// XCR0: register state that the operating system saves on a context switch.
unsigned enabled_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Asks Linux for the tile registers of AMX, as every process must before it uses them.
bool request_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect_features() {
  const auto has = [](unsigned reg, int bit) { return (reg >> bit & 1u) != 0; };
  CpuFeatures features;
  const CpuidRegisters leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  if (!has(leaf1.ecx, 27)) return features;  // OSXSAVE
  constexpr unsigned kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
  const unsigned state = enabled_state();
  const bool fma = has(leaf1.ecx, 12), f16c = has(leaf1.ecx, 29);
  features.avx2 = (state & kYmmState) == kYmmState && fma && f16c && has(leaf7.ebx, 5);
  const bool f = has(leaf7.ebx, 16), dq = has(leaf7.ebx, 17), bw = has(leaf7.ebx, 30), vl = has(leaf7.ebx, 31);
  features.avx512 = features.avx2 && (state & kZmmState) == kZmmState && f && dq && bw && vl;
  features.avx512bf16 = features.avx512 && has(leaf7_1.eax, 5);
  features.amx_bf16 = (state & kTileState) == kTileState && has(leaf7.edx, 24) && has(leaf7.edx, 22) && request_tiles();
  features.amx = features.avx512bf16 && features.amx_bf16;
  return features;
}
#elif defined(__aarch64__)
CpuFeatures detect_features() {
  constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16
  CpuFeatures features;
  features.neon = true;  // part of the architecture
  features.neonbf16 = (getauxval(AT_HWCAP2) & kBFloat16) != 0;
  return features;
}
#else
CpuFeatures detect_features() { return {}; }
#endif

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect_features();
  return features;
}

struct IsaEntry {
  const char* name;
  const KernelTable* table;  // null: not in this build
  bool runs_here;
};

// Fastest first.
const std::vector<IsaEntry>& isa_entries() {
  static const std::vector<IsaEntry> entries = [] {
    const CpuFeatures& features = cpu_features();
    const KernelTable *avx2_table = nullptr, *avx512_table = nullptr, *avx512bf16_table = nullptr;
    const KernelTable *amx_table = nullptr, *neon_table = nullptr, *neonbf16_table = nullptr;
#ifdef DECO_HAVE_ISA_avx2
    avx2_table = &avx2::kTable;
#endif
#ifdef DECO_HAVE_ISA_avx512
    avx512_table = &avx512::kTable;
#endif
#ifdef DECO_HAVE_ISA_avx512bf16
    avx512bf16_table = &avx512bf16::kTable;
#endif
#ifdef DECO_HAVE_ISA_amx
    amx_table = &amx::kTable;
#endif
#ifdef DECO_HAVE_ISA_neon
    neon_table = &neon::kTable;
#endif
#ifdef DECO_HAVE_ISA_neonbf16
    neonbf16_table = &neonbf16::kTable;
#endif
    return std::vector<IsaEntry>{{"amx", amx_table, features.amx},
                                 {"avx512bf16", avx512bf16_table, features.avx512bf16},
                                 {"avx512", avx512_table, features.avx512},
                                 {"avx2", avx2_table, features.avx2},
                                 {"neonbf16", neonbf16_table, features.neonbf16},
                                 {"neon", neon_table, features.neon},
                                 {"portable", &portable::kTable, true}};
  }();
  return entries;
}

const IsaEntry* fastest_entry() {
  for (const IsaEntry& entry : isa_entries())
    if (entry.table != nullptr && entry.runs_here) return &entry;
  return nullptr;  // unreachable: portable always runs
}

std::atomic<const IsaEntry*>& current_entry() {
  static std::atomic<const IsaEntry*> entry{fastest_entry()};
  return entry;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const IsaEntry& entry : isa_entries())
    if (entry.table != nullptr && entry.runs_here) names.push_back(entry.name);
  return names;
}

std::string current_isa() { return current_entry().load()->name; }

void select_isa(const std::string& name) {
  for (const IsaEntry& entry : isa_entries()) {
    if (name != entry.name) continue;
    if (entry.table != nullptr && entry.runs_here) {
      current_entry() = &entry;
      return;
    }
    const char* reason = entry.table == nullptr ? "was not built (the compiler lacks it)"
                                                : "is not supported by this processor or system";
    throw std::invalid_argument("instruction set '" + name + "' " + reason + "; usable here: " + join(usable_isas()));
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; usable here: " + join(usable_isas()));
}

int vector_lanes() { return kernel_table().lanes; }

bool has_amx_bf16() { return cpu_features().amx_bf16; }

const KernelTable& kernel_table() { return *current_entry().load(std::memory_order_relaxed)->table; }

#define DECO_FORWARD(function, Argument) \
  void function(const Argument& argument) { kernel_table().function(argument); }
DECO_CPU_OPS(DECO_FORWARD)
#undef DECO_FORWARD

}  // namespace deco::cpu
