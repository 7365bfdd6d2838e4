// Per-pixel decoder (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/adaln_block.h"

namespace deco {

struct DecoderShape {
  int64_t batch = 0, height = 0, width = 0;
  int channels = 0;       // C: 1 to 4
  int patch_size = 0;     // p: 1, 2, 4, 8 or 16; divides height and width
  int decoder_width = 0;  // D: 16, 32 or 64
  int depth = 0;          // N: 1 to 8

  int64_t tokens() const { return batch * (height / patch_size) * (width / patch_size); }
  int pixels_per_token() const { return patch_size * patch_size; }
  int64_t pixels() const { return batch * height * width; }

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", batch, channels, height, width, patch_size, decoder_width, depth);
  }
};

// Weights of the decoder, or their gradients; every array is contiguous and has its own dtype.
struct DecoderWeightArrays {
  Array pixel_weight;        // [D, C]
  Array pixel_table;         // [P, D]
  BlockWeightArrays blocks;  // N decoder blocks
  Array head_weight;         // [C, D]
  Array head_bias;           // [C]

  template <class Visit>
  void fields(Visit&& visit) {
    visit("weights", pixel_weight, pixel_table, blocks, head_weight, head_bias);
  }
};

struct PixelDecoderForward {
  DecoderShape shape;
  ImageArray image;
  PixelRows cond;   // [T, P, D]; its dtype is the activation dtype
  PixelRows query;  // [T, P, D] in that dtype, or null
  DecoderWeightArrays weights;
  ImageArray velocity;  // written
  int head_norm = 0;    // 0: LayerNorm, 1: RMSNorm
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("image", image);
    visit("cond", cond);
    visit("query", query);
    visit("weights", weights);
    visit("velocity", velocity);
    visit("head_norm", head_norm);
    visit("eps", eps);
  }
};

struct PixelDecoderBackward {
  DecoderShape shape;
  ImageArray grad_velocity;
  ImageArray image;
  PixelRows cond;
  PixelRows query;
  DecoderWeightArrays weights;
  // Written; gradients with null data are not computed.
  ImageArray grad_image;
  PixelRows grad_cond;
  PixelRows grad_query;
  DecoderWeightArrays grad_weights;
  int head_norm = 0;
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("grad_velocity", grad_velocity);
    visit("image", image);
    visit("cond", cond);
    visit("query", query);
    visit("weights", weights);
    visit("grad_image", grad_image);
    visit("grad_cond", grad_cond);
    visit("grad_query", grad_query);
    visit("grad_weights", grad_weights);
    visit("head_norm", head_norm);
    visit("eps", eps);
  }
};

namespace cpu {

struct PixelDecoderForward : Threaded<deco::PixelDecoderForward> {};
struct PixelDecoderBackward : Threaded<deco::PixelDecoderBackward> {};

void pixel_decoder_forward(const PixelDecoderForward& call);
void pixel_decoder_backward(const PixelDecoderBackward& call);

}  // namespace cpu
}  // namespace deco
