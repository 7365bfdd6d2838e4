// The backward of one decoder block as a step of a chain: adaln_block alone, or the blocks of a decoder from the last to
// the first. Without the MLP: the modulation of upsample_modulate.
#pragma once

#include "cuda/packed_weights.h"

namespace deco::cuda {

struct BlockBackward {
  PackedWeights packed;
  PatchRows cond;      // condition of the block
  RowsView h;          // its input
  RowsView grad;       // gradient of h' with the MLP, else of the modulated rows
  RowsView grad_gate;  // without the MLP: gradient of the gate
  RowsView grad_h;     // written; may be the memory of grad
  RowsView grad_cond;  // the gradient of s, summed over the blocks of a chain and turned into that of cond by the last
                       // one; null if not wanted

  // With the MLP: h, s = SiLU(cond), and the gradient of h', which that of h replaces, as operand tiles (pixels.h) in
  // place of h, grad and grad_h. Null if the block has rows.
  const void *h_tiles = nullptr, *s_tiles = nullptr;
  void* grad_tiles = nullptr;

  float* partials = nullptr;  // [block_backward_parts][depth][M][D][D + 1], or null if no weight gradient is wanted
  uint32_t pixels = 0;
  int block = 0;  // of the packed weights
  int depth = 1;  // blocks that share the partials
  int width = 0;
  int chain_warps = 0, parts = 0;  // set by block_backward
  bool first = true, last = true;  // of the chain of blocks
  bool accumulate = false;         // add to the partials rather than overwrite them
  bool mlp = true;
  float eps = 0;
  DType operand = DType::kBFloat16;
};

// How many partial sums there are at most for so many pixels.
int block_backward_parts(const DeviceLimits& limits, int width, bool mlp, int64_t pixels);
Status block_backward(const Call& call, const BlockBackward& op);

// The whole backward of a block on its own: pack, one step, sums, gradients of the weights where not null. Sets the
// fields of `op` that have to do with weights.
int64_t single_block_backward_workspace(const DeviceLimits& limits, int width, bool mlp, int64_t pixels);
Status single_block_backward(const Call& call, BlockBackward op, const BlockWeightArrays& weights,
                             const BlockWeightArrays& gradients);

}  // namespace deco::cuda
