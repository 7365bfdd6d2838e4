// Backward of the decoder behind its head, for one chunk of pixels after the other: the decoder blocks in reverse order
// and the embedding. Chunks accumulate sums over pixels in partial buffers, which are added in a fixed order at the end
// and converted to the gradients of the op's weights (gradient_sums.cu).
#pragma once

#include "cuda/block_backward.h"
#include "cuda/decoder_kernels.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

struct DecoderChunk {
  DecoderShape shape;  // of the images
  Image image;
  Image grad_image;                // written, or null
  PatchRows cond;                  // of the chunk
  RowsView grad_cond, grad_query;  // of the chunk: written, or null
  int64_t first_pixel = 0, pixels = 0;
  bool accumulate = false;  // not the first chunk
};

inline bool wants_gradients(const DecoderWeightArrays& g) {
  return any(g.blocks) || g.pixel_weight.data != nullptr || g.pixel_table.data != nullptr ||
         g.head_weight.data != nullptr || g.head_bias.data != nullptr;
}

// The memory of a decoder's backward and its steps. The workspace holds 2·D·(N + 2) bytes per pixel of a chunk, or 2·D if
// the forward has kept the activations.
class DecoderChunks {
 public:
  // Takes the memory from `parts`. `pixels`: of the largest chunk, which is the first; `head_parts`: partial sums of the
  // head's gradient; `activations`: of the only chunk, as in PixelDecoderBackward, or null.
  DecoderChunks(WorkspaceParts& parts, const DeviceLimits& limits, const DecoderShape& shape, int64_t pixels,
                int head_parts, const void* activations = nullptr);

  const PackedWeights& packed() const { return packed_; }
  // Operand tiles of a chunk: inputs of the N decoder blocks and of the head; SiLU(cond); the gradient of h, in place of
  // h_N in the workspace.
  uint16_t* h_tiles(int block, int64_t pixels) const { return h_ + block * tiled_values(pixels, width_); }
  uint16_t* s_tiles() const { return s_; }
  uint16_t* grad_h_tiles(int64_t pixels) const { return grad_h_ != nullptr ? grad_h_ : h_tiles(depth_, pixels); }
  float* head_partials() const { return head_; }

  // The backward of the head. This and the next function add to the partial sums with `sums`.
  Status head(const Call& call, DType operand, float eps, bool rms, const DecoderChunk& chunk,
              const Image& grad_velocity, bool sums) const;
  // From the gradient of h_N on.
  Status backward(const Call& call, DType operand, float eps, const DecoderChunk& chunk, bool sums) const;
  // Writes the gradients of the weights that are not null. `shape`: with the patch size of the images.
  Status sum_weights(const Call& call, const DecoderShape& shape, const DecoderWeightArrays& weights,
                     const DecoderWeightArrays& gradients) const;

 private:
  PackedWeights packed_;
  uint16_t *h_, *s_, *grad_h_ = nullptr;
  float *blocks_, *head_, *pixel_, *table_;  // partials
  float *blocks_sum_, *head_sum_, *pixel_sum_;
  int width_, depth_, block_parts_, head_parts_, embedding_parts_;
  int64_t pixels_;
};

}  // namespace deco::cuda
