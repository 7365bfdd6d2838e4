// Per-pixel decoder and flow-matching loss in one pass on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/cuda/call.h"
#include "deco/pixel_decoder.h"

namespace deco::cuda {

// The dtype of cond, bfloat16 or float16, is the compute dtype; rows of cond, query and their gradients are aligned to 16
// bytes. image has that dtype or float32. target too, with unit stride along a row and rows aligned to 16 bytes. H and W
// are multiples of 8.
struct PixelDecoderLoss {
  DecoderShape shape;  // C = 3, p = 8 or 16
  ImageArray image;
  PixelRows cond;     // [T, P, D]
  PixelRows query;    // [T, P, D] in the dtype of cond, or null
  ImageArray target;  // [B, 3, H, W]
  DecoderWeightArrays weights;
  Array frequency_weight;  // [3, 8, 8] for Y, Cb, Cr; row = vertical frequency
  Array sample_weight;     // [B]; null: ones
  float frequency_scale = 1;
  float *total = nullptr, *pixel = nullptr, *frequency = nullptr;  // written: scalars on the device
  // Gradients of grad_total·total, written; those with null data are not computed. grad_cond, grad_query, grad_target and
  // arrays are contiguous, grad_target has the dtype of target and is aligned to 16 bytes.
  float grad_total = 1;
  ImageArray grad_image;
  PixelRows grad_cond;
  PixelRows grad_query;
  ImageArray grad_target;
  DecoderWeightArrays grad_weights;
  Array grad_frequency_weight;  // [3, 8, 8]
  Array grad_sample_weight;     // [B]
  int head_norm = 0;            // 0: LayerNorm, 1: RMSNorm
  float eps = 0;
  int64_t chunk_images = 1, chunk_rows = 0;  // size of a chunk: whole images, or whole rows of patches of one image

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("image", image);
    visit("cond", cond);
    visit("query", query);
    visit("target", target);
    visit("weights", weights);
    visit("loss_weights", frequency_weight, sample_weight);
    visit("frequency_scale", frequency_scale);
    visit("losses", total, pixel, frequency);
    visit("grad_total", grad_total);
    visit("grad_image", grad_image);
    visit("grad_cond", grad_cond);
    visit("grad_query", grad_query);
    visit("grad_target", grad_target);
    visit("grad_weights", grad_weights);
    visit("grad_loss_weights", grad_frequency_weight, grad_sample_weight);
    visit("head_norm", head_norm);
    visit("eps", eps);
    visit("chunk", chunk_images, chunk_rows);
  }
};

// velocity = pixel_decoder(image, cond),  d = velocity - target,  s = sample_weight,  W = frequency_weight
// pixel = sum_b s_b sum d^2 / (3 B H W)
// frequency = sum_b s_b sum W (DCT(YCbCr(d)))^2 / (3 B H W)
// total = pixel + frequency_scale frequency
// An empty batch writes nothing. Refused: a workspace that is too small, and more pixels than 32 bits count.
int64_t pixel_decoder_loss_workspace(const DeviceLimits& limits, const PixelDecoderLoss& op);
Status pixel_decoder_loss(const Call& call, const PixelDecoderLoss& op);

}  // namespace deco::cuda
