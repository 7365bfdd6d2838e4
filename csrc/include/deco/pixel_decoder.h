// The per-pixel decoder on the CPU (DeCo, arXiv 2511.19365, section 3).
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
};

// The weights, or their gradients; every array is contiguous and has its own dtype.
struct DecoderWeightArrays {
  Array pixel_weight;        // [D, C]
  Array pixel_table;         // [P, D]
  BlockWeightArrays blocks;  // N blocks
  Array head_weight;         // [C, D]
  Array head_bias;           // [C]
};

namespace cpu {

struct PixelDecoderForward {
  DecoderShape shape;
  ImageArray image;
  PixelRows cond;  // [T, P, D]; its dtype is the activation dtype
  DecoderWeightArrays weights;
  ImageArray velocity;  // written
  float eps = 0;
  int threads = 1;
};

struct PixelDecoderBackward {
  DecoderShape shape;
  ImageArray grad_velocity;
  ImageArray image;
  PixelRows cond;
  DecoderWeightArrays weights;
  // Written; a gradient whose data is null is not wanted.
  ImageArray grad_image;
  PixelRows grad_cond;
  DecoderWeightArrays grad_weights;
  float eps = 0;
  int threads = 1;
};

void pixel_decoder_forward(const PixelDecoderForward& call);
void pixel_decoder_backward(const PixelDecoderBackward& call);

}  // namespace cpu
}  // namespace deco
