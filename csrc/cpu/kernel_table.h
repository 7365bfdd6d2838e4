// One table of entry points per instruction set; dispatch.cpp selects one at run time.
#pragma once

// All ops of the CPU backend: X(function, type of its argument). Each line declares the public function
// deco::cpu::function, the function in each instruction set's namespace, and the entry of the table.
#define DECO_CPU_OPS(X)                                               \
  X(adaln_block_forward, AdalnBlockForward)                           \
  X(adaln_block_backward, AdalnBlockBackward)                         \
  X(pixel_decoder_forward, PixelDecoderForward)                       \
  X(pixel_decoder_backward, PixelDecoderBackward)                     \
  X(pixel_decoder_from_tokens_forward, PixelDecoderFromTokensForward) \
  X(pixel_decoder_loss, PixelDecoderLoss)                             \
  X(upsample_forward, UpsampleForward)                                \
  X(upsample_backward, UpsampleBackward)                              \
  X(upsample_modulate_forward, UpsampleModulateForward)               \
  X(modulate_forward, ModulateForward)                                \
  X(modulate_backward, ModulateBackward)                              \
  X(flow_matching_loss_forward, FlowMatchingLossForward)              \
  X(flow_matching_loss_backward, FlowMatchingLossBackward)

namespace deco::cpu {

#define DECO_DECLARE_ARGUMENT(function, Argument) struct Argument;
DECO_CPU_OPS(DECO_DECLARE_ARGUMENT)
#undef DECO_DECLARE_ARGUMENT

struct KernelTable {
  int lanes;  // floats per vector
#define DECO_DECLARE_ENTRY(function, Argument) void (*function)(const Argument&);
  DECO_CPU_OPS(DECO_DECLARE_ENTRY)
#undef DECO_DECLARE_ENTRY
};

// Table of the current instruction set.
const KernelTable& kernel_table();

}  // namespace deco::cpu

#ifdef DECO_CPU_ISA
namespace deco::cpu::DECO_CPU_ISA {
#define DECO_DECLARE_KERNEL(function, Argument) void function(const Argument&);
DECO_CPU_OPS(DECO_DECLARE_KERNEL)
#undef DECO_DECLARE_KERNEL
}  // namespace deco::cpu::DECO_CPU_ISA
#endif
