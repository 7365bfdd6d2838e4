// Upsample and per-pixel decoder as one op on the CPU (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/pixel_decoder.h"
#include "deco/upsample.h"

namespace deco::cpu {

struct PixelDecoderFromTokensForward {
  DecoderShape shape;
  ImageArray image;
  UpsampleArrays upsample;
  DecoderWeightArrays weights;
  ImageArray velocity;  // written
  float eps = 0;
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("image", image);
    upsample.fields(visit);
    visit("weights", weights);
    visit("velocity", velocity);
    visit("eps", eps);
    visit("threads", threads);
  }
};

void pixel_decoder_from_tokens_forward(const PixelDecoderFromTokensForward& call);

}  // namespace deco::cpu
