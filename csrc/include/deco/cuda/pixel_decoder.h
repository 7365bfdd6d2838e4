// Per-pixel decoder on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/cuda/call.h"
#include "deco/pixel_decoder.h"

namespace deco::cuda {

// `pixels` rounded up to whole tiles of every kernel, so that kernels write operand tiles without bounds checks.
inline int64_t padded_rows(int64_t pixels) { return (pixels + 255) / 256 * 256; }

// The dtype of cond, bfloat16 or float16, is the compute dtype; rows of cond, query and their gradients are aligned to 16
// bytes. Images have any strides and that dtype or float32, the velocity and its gradient that dtype; grad_cond and
// grad_query are contiguous.
//
// activations: what the backward otherwise computes again, [N + 2][padded_rows(pixels)][D] of the compute dtype: the
// inputs of the N decoder blocks and of the head, then SiLU(cond), as operand tiles (cuda/pixels.h).
struct PixelDecoderForward : deco::PixelDecoderForward {
  void* activations = nullptr;  // written, or null

  template <class Visit>
  void fields(Visit&& visit) {
    deco::PixelDecoderForward::fields(visit);
    visit("activations", activations);
  }
};

struct PixelDecoderBackward : deco::PixelDecoderBackward {
  // Of the forward; then there is one chunk. Null: computed again.
  const void* activations = nullptr;
  int64_t chunk_pixels = 0;  // pixels per chunk (size of the workspace), rounded down to whole tokens

  template <class Visit>
  void fields(Visit&& visit) {
    deco::PixelDecoderBackward::fields(visit);
    visit("activations", activations);
    visit("chunk_pixels", chunk_pixels);
  }
};

int64_t pixel_decoder_forward_workspace(const DecoderShape& shape);
Status pixel_decoder_forward(const Call& call, const PixelDecoderForward& op);
int64_t pixel_decoder_backward_workspace(const DeviceLimits& limits, const PixelDecoderBackward& op);
Status pixel_decoder_backward(const Call& call, const PixelDecoderBackward& op);

}  // namespace deco::cuda
