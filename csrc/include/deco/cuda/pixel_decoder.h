// Per-pixel decoder on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/cuda/call.h"
#include "deco/pixel_decoder.h"

namespace deco::cuda {

// The dtype of cond, bfloat16 or float16, is the compute dtype; rows of cond, query and their gradients are aligned to 16
// bytes. Images have any strides and that dtype or float32, the velocity and its gradient that dtype; grad_cond and
// grad_query are contiguous.
struct PixelDecoderBackward : deco::PixelDecoderBackward {
  int64_t chunk_pixels = 0;  // pixels per chunk (size of the workspace), rounded down to whole tokens

  template <class Visit>
  void fields(Visit&& visit) {
    deco::PixelDecoderBackward::fields(visit);
    visit("chunk_pixels", chunk_pixels);
  }
};

int64_t pixel_decoder_forward_workspace(const DecoderShape& shape);
Status pixel_decoder_forward(const Call& call, const PixelDecoderForward& op);
int64_t pixel_decoder_backward_workspace(const DeviceLimits& limits, const DecoderShape& shape, int64_t chunk_pixels);
Status pixel_decoder_backward(const Call& call, const PixelDecoderBackward& op);

}  // namespace deco::cuda
