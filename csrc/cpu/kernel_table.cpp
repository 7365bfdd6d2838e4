#include "cpu/kernel_table.h"

#include "cpu/vec.h"

namespace deco::cpu::DECO_CPU_ISA {

extern const KernelTable kTable;
// clang-format off
const KernelTable kTable = {
    kLanes,
#define DECO_ENTRY(function, Argument) function,
    DECO_CPU_OPS(DECO_ENTRY)
#undef DECO_ENTRY
};
// clang-format on

}  // namespace deco::cpu::DECO_CPU_ISA
