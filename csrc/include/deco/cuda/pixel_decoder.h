// Per-pixel decoder on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/cuda/call.h"
#include "deco/pixel_decoder.h"

namespace deco::cuda {

// The dtype of cond, bfloat16 or float16, is the compute dtype; rows of cond are aligned to 16 bytes. Images have that
// dtype or float32.
struct PixelDecoderForward {
  DecoderShape shape;
  ImageArray image;
  PixelRows cond;
  DecoderWeightArrays weights;
  ImageArray velocity;  // written: dtype of cond, unit stride along a row
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("image", image);
    visit("cond", cond);
    visit("weights", weights);
    visit("velocity", velocity);
    visit("eps", eps);
  }
};

struct PixelDecoderBackward {
  DecoderShape shape;
  ImageArray grad_velocity;  // dtype of cond
  ImageArray image;
  PixelRows cond;
  DecoderWeightArrays weights;
  // Written; gradients with null data are not computed.
  ImageArray grad_image;
  void* grad_cond = nullptr;  // [T, P, D] contiguous, dtype of cond, aligned to 16 bytes
  DecoderWeightArrays grad_weights;
  float eps = 0;
  int64_t chunk_pixels = 0;  // pixels per chunk (size of the workspace), rounded down to whole tokens

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("grad_velocity", grad_velocity);
    visit("image", image);
    visit("cond", cond);
    visit("weights", weights);
    visit("grad_image", grad_image);
    visit("grad_cond", grad_cond);
    visit("grad_weights", grad_weights);
    visit("eps", eps);
    visit("chunk_pixels", chunk_pixels);
  }
};

int64_t pixel_decoder_forward_workspace(const DecoderShape& shape);
Status pixel_decoder_forward(const Call& call, const PixelDecoderForward& op);
int64_t pixel_decoder_backward_workspace(const DeviceLimits& limits, const DecoderShape& shape, int64_t chunk_pixels);
Status pixel_decoder_backward(const Call& call, const PixelDecoderBackward& op);

}  // namespace deco::cuda
