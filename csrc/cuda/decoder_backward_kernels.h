// The two ends of the decoder's backward; block_backward.h is what lies between them.
#pragma once

#include "cuda/decoder_geometry.h"

namespace deco::cuda {

// Runs the decoder forward again and its head backward:
//   n = LayerNorm(h_N);  δn = W_outᵀ·δvelocity;  δh_N = LayerNorm'(δn);  δW_out = Σ δvelocity ⊗ n;  δb_out = Σ δvelocity
struct DecoderRecompute {
  PackedWeights packed;
  DecoderShape shape;  // of the whole batch
  Image image, grad_velocity;
  PatchRows cond;  // of the chunk, as all rows here
  int64_t first_pixel = 0, pixels = 0;
  float eps = 0;

  // Written as operand tiles (pixels.h), padded_rows(pixels) pixels each:
  void* h_tiles = nullptr;       // [N], the inputs of the blocks
  void* s_tiles = nullptr;       // SiLU(cond)
  void* grad_h_tiles = nullptr;  // the gradient of h_N
  float* partials = nullptr;     // [decoder_recompute_parts][D + 1][kChannelSlots], or null
  bool accumulate = false;       // add to the partials rather than overwrite them
};
int decoder_recompute_parts(const DeviceLimits& limits, int width, int64_t pixels);
Status decoder_recompute(const Call& call, DType operand, const DecoderRecompute& op);

// The backward of the embedding h = W_x·x + table[k]:
//   δx = W_xᵀ·δh;  δW_x = Σ δh ⊗ x;  δtable[k] = Σ over tokens of δh
struct DecoderEmbedding {
  PackedWeights packed;
  DecoderShape shape;
  Image image;
  const void* grad_h_tiles = nullptr;  // operand tiles
  Image grad_image;                    // written, or null
  int64_t first_pixel = 0, pixels = 0;

  float* partials = nullptr;        // [decoder_embedding_parts][D + 1][kChannelSlots], or null like table_partials
  float* table_partials = nullptr;  // [warps][min(P, 16)][D]
  bool accumulate = false;
};
int decoder_embedding_parts(const DeviceLimits& limits, int64_t pixels);
int64_t decoder_embedding_table_numbers(const DeviceLimits& limits, const DecoderShape& shape, int64_t pixels);
Status decoder_embedding(const Call& call, DType operand, const DecoderEmbedding& op);

// The gradient of the pixel table from the partials that chunks of at most `pixels` pixels left.
Status sum_table_partials(const Call& call, const Array& grad_table, const float* table_partials,
                          const DecoderShape& shape, int64_t pixels);

}  // namespace deco::cuda
