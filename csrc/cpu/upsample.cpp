// The upsample y = W_up token + b_up alone, for backwards that compute y again; its tiles are those of the fused forwards
// (upsample.h), so that y has the same bits. Per pixel: D Z multiply-adds; writes D values. Deterministic, independent of
// the number of threads.
#include "cpu/upsample.h"

#include "cpu/kernel_table.h"

namespace deco::cpu::DECO_CPU_ISA {

void upsample_forward(const UpsampleForward& call) {
  if (call.tokens == 0) return;
  with_operand_and_width(call.rows.dtype, call.width, [&](auto operand, auto width) {
    Upsample<decltype(operand), width.value> upsample(call, call.threads);
    with_scratch([&](Arena& arena) { upsample.lay_out(arena); });
    upsample.for_each_tile([&](int, const UpsampleTile<decltype(operand)>& tile) { upsample.store_cond(tile); });
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
