#include "cpu/kernel_table.h"

#include "cpu/vec.h"

namespace deco::cpu::DECO_CPU_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {
    kLanes,
#define DECO_ENTRY(function, Argument) function,
    DECO_CPU_OPS(DECO_ENTRY)
#undef DECO_ENTRY
};

}  // namespace deco::cpu::DECO_CPU_ISA
