// Kernels of the decoder's forward and backward, except block_backward.h.
#pragma once

#include "cuda/decoder_geometry.h"

namespace deco::cuda {

// What other decoders add to DeCo's: a query per pixel, h = W_x·x + table[k] + query, and a head with RMSNorm. Kernels
// have variants for it, so that DeCo's decoder costs nothing more: Extended, of the head with RMSNorm, of the embedding
// with the gradient of the query.
struct DecoderExtension {
  PatchRows query;  // of the chunk; or null
  bool rms = false;

  bool any() const { return query.data != nullptr || rms; }
};

// Calls run(std::bool_constant<extended>{}). DECO_ONLY_PLAIN leaves the extended kernels out.
template <class Run>
Status with_extension([[maybe_unused]] bool extended, Run&& run) {
#ifndef DECO_ONLY_PLAIN
  if (extended) return run(std::true_type{});
#endif
  return run(std::false_type{});
}

// The decoder's forward (pixel_decoder.cu).
struct DecoderForward {
  PackedWeights packed;
  DecoderShape shape;
  Image image, velocity;  // velocity: written
  PatchRows cond;
  float eps = 0;

  // Written unless null: operand tiles (pixels.h), padded_rows(pixels) pixels each.
  void* h_tiles = nullptr;  // [N + 1], inputs of the decoder blocks and of the head
  void* s_tiles = nullptr;  // SiLU(cond)
};
Status decoder_forward(const Call& call, DType operand, const DecoderForward& op, const DecoderExtension& extension);

// Backward of the head; Norm: LayerNorm, or RMSNorm with `rms`:
//   n = Norm(h_N);  δn = W_outᵀ·δvelocity;  δh_N = Norm'(δn)
//   δW_out = Σ δvelocity ⊗ n;  δb_out = Σ δvelocity
struct DecoderHead {
  PackedWeights packed;
  DecoderShape shape;
  Image grad_velocity;
  float eps = 0;
  const void* h_tiles = nullptr;  // operand tiles of h_N
  void* grad_h_tiles = nullptr;   // written, may be h_tiles: those of its gradient
  float* partials = nullptr;      // [decoder_head_parts][D + 1][kChannelSlots], or null
  bool accumulate = false;        // add to the partials instead of overwriting them
};
int decoder_head_parts(const DeviceLimits& limits, int width, int64_t pixels);
Status decoder_head(const Call& call, DType operand, const DecoderHead& op, bool rms);

// Recomputes the decoder's forward and runs the backward of its head.
struct DecoderRecompute {
  PackedWeights packed;
  DecoderShape shape;  // of the whole batch
  Image image, grad_velocity;
  PatchRows cond;  // of the chunk, like all rows here
  int64_t first_pixel = 0, pixels = 0;
  float eps = 0;

  // Written: operand tiles (pixels.h), padded_rows(pixels) pixels each.
  void* h_tiles = nullptr;       // [N], inputs of the decoder blocks
  void* s_tiles = nullptr;       // SiLU(cond)
  void* grad_h_tiles = nullptr;  // gradient of h_N
  float* partials = nullptr;     // [decoder_recompute_parts][D + 1][kChannelSlots], or null
  bool accumulate = false;       // add to the partials instead of overwriting them
};
int decoder_recompute_parts(const DeviceLimits& limits, int width, int64_t pixels);
Status decoder_recompute(const Call& call, DType operand, const DecoderRecompute& op,
                         const DecoderExtension& extension);

// Backward of the embedding h = W_x·x + table[k] + query:
//   δx = W_xᵀ·δh;  δW_x = Σ δh ⊗ x;  δtable[k] = Σ over tokens of δh;  δquery = δh
struct DecoderEmbedding {
  PackedWeights packed;
  DecoderShape shape;
  Image image;
  const void* grad_h_tiles = nullptr;  // operand tiles
  Image grad_image;                    // written, or null
  int64_t first_pixel = 0, pixels = 0;

  float* partials = nullptr;        // [decoder_embedding_parts][D + 1][kChannelSlots]; null if table_partials is
  float* table_partials = nullptr;  // [decoder_embedding_parts][min(P, 16)][D]
  bool accumulate = false;
};
int decoder_embedding_parts(const DeviceLimits& limits, const DecoderShape& shape, int64_t pixels);
int64_t decoder_embedding_table_numbers(const DeviceLimits& limits, const DecoderShape& shape, int64_t pixels);
// grad_query: written, or null
Status decoder_embedding(const Call& call, DType operand, const DecoderEmbedding& op, const RowsView& grad_query);

// Gradient of the pixel table from the partials of chunks of at most `pixels` pixels.
Status sum_table_partials(const Call& call, const Array& grad_table, const float* table_partials,
                          const DecoderShape& shape, int64_t pixels);

}  // namespace deco::cuda
