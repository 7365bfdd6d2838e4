// Backward of one decoder block, as one step of a chain: the single decoder block of adaln_block, or the decoder blocks
// of pixel_decoder in reverse order. Without the MLP: the modulation of upsample_modulate.
#pragma once

#include "cuda/packed_weights.h"

namespace deco::cuda {

struct BlockBackward {
  PackedWeights packed;
  PatchRows cond;      // condition of the decoder block
  RowsView h;          // input of the decoder block
  RowsView grad;       // gradient of h' with the MLP, of the modulated rows without
  RowsView grad_gate;  // without the MLP: gradient of the gate
  RowsView grad_h;     // written; may alias grad
  RowsView grad_cond;  // written: gradient of s, accumulated over the chain; the last step converts it to the gradient
                       // of cond. Null: not computed

  // With the MLP: operand tiles (pixels.h) that replace h, grad and grad_h: h, s = SiLU(cond), and the gradient of h',
  // overwritten by the gradient of h. Null if rows are used.
  const void *h_tiles = nullptr, *s_tiles = nullptr;
  void* grad_tiles = nullptr;

  float* partials = nullptr;  // [block_backward_parts][depth][M][D][D + 1]; null: no weight gradients
  uint32_t pixels = 0;
  int block = 0;  // index of the decoder block in the packed weights and the partials
  int depth = 1;  // decoder blocks in the partials
  int width = 0;
  int chain_warps = 0, buffers = 0, parts = 0;  // set by block_backward
  bool first = true, last = true;               // first and last step of the chain
  bool accumulate = false;                      // add to the partials instead of overwriting them
  bool mlp = true;
  float eps = 0;
  DType operand = DType::kBFloat16;
};

// Upper bound of the number of partial sums of launches with at most `pixels` pixels.
int block_backward_parts(const DeviceLimits& limits, int width, bool mlp, int64_t pixels);
Status block_backward(const Call& call, const BlockBackward& op);

// Complete backward of a single decoder block: packs the weights, runs one step, sums the partials and writes the
// gradients of the weights that are not null. Sets `packed` and `partials` of `op`.
int64_t single_block_backward_workspace(const DeviceLimits& limits, int width, bool mlp, int64_t pixels);
Status single_block_backward(const Call& call, BlockBackward op, const BlockWeightArrays& weights,
                             const BlockWeightArrays& gradients);

}  // namespace deco::cuda
