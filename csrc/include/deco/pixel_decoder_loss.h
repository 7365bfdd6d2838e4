// Per-pixel decoder and flow-matching loss in one pass on the CPU (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/pixel_decoder.h"

namespace deco::cpu {

struct PixelDecoderLoss {
  DecoderShape shape;  // C = 3, p = 8 or 16, H and W multiples of 8
  ImageArray image;
  PixelRows cond;     // [T, P, D]; its dtype is the activation dtype
  PixelRows query;    // [T, P, D] in that dtype, or null
  ImageArray target;  // [B, 3, H, W]
  DecoderWeightArrays weights;
  const float* frequency_weight = nullptr;  // [3, 8, 8] for Y, Cb, Cr; row = vertical frequency
  const float* sample_weight = nullptr;     // [B]; null: ones
  double frequency_scale = 1;
  float *total = nullptr, *pixel = nullptr, *frequency = nullptr;  // written
  // Gradients of total, written; those with null data are not computed, arrays of grad_weights are contiguous.
  // `backward`: whether one is wanted besides those of frequency_weight and sample_weight; if 0, all others are null.
  int backward = 0;
  ImageArray grad_image;
  PixelRows grad_cond;
  PixelRows grad_query;
  ImageArray grad_target;
  DecoderWeightArrays grad_weights;
  float* grad_frequency_weight = nullptr;  // [3, 8, 8]
  float* grad_sample_weight = nullptr;     // [B]
  int head_norm = 0;                       // 0: LayerNorm, 1: RMSNorm
  float eps = 0;
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("image", image);
    visit("cond", cond);
    visit("query", query);
    visit("target", target);
    visit("weights", weights);
    visit("frequency_weight", frequency_weight);
    visit("sample_weight", sample_weight);
    visit("frequency_scale", frequency_scale);
    visit("total", total);
    visit("pixel", pixel);
    visit("frequency", frequency);
    visit("backward", backward);
    visit("grad_image", grad_image);
    visit("grad_cond", grad_cond);
    visit("grad_query", grad_query);
    visit("grad_target", grad_target);
    visit("grad_weights", grad_weights);
    visit("grad_frequency_weight", grad_frequency_weight);
    visit("grad_sample_weight", grad_sample_weight);
    visit("head_norm", head_norm);
    visit("eps", eps);
    visit("threads", threads);
  }
};

// velocity = pixel_decoder(image, cond, query),  d = velocity - target,  s = sample_weight,  W = frequency_weight
// pixel = sum_b s_b sum d^2 / (3 B H W)
// frequency = sum_b s_b sum W (DCT(YCbCr(d)))^2 / (3 B H W)
// total = pixel + frequency_scale frequency
// The caller has checked shapes and strides; an empty batch gives zeros.
void pixel_decoder_loss(const PixelDecoderLoss& call);

}  // namespace deco::cpu
