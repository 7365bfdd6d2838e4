// Upsample and per-pixel decoder as one op on the CPU (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/pixel_decoder.h"
#include "deco/upsample.h"

namespace deco::cpu {

struct PixelDecoderFromTokensForward {
  DecoderShape shape;
  ImageArray image;
  UpsampleArrays upsample;
  PixelRows query;                // [T, P, D] in the activation dtype, or null
  UpsampleArrays query_upsample;  // in place of query, or 0 tokens; its cond is null
  DecoderWeightArrays weights;
  ImageArray velocity;  // written
  int head_norm = 0;    // 0: LayerNorm, 1: RMSNorm
  float eps = 0;
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", shape);
    visit("image", image);
    upsample.fields(visit);
    visit("query", query);
    visit("query_upsample", query_upsample);
    visit("weights", weights);
    visit("velocity", velocity);
    visit("head_norm", head_norm);
    visit("eps", eps);
    visit("threads", threads);
  }
};

void pixel_decoder_from_tokens_forward(const PixelDecoderFromTokensForward& call);

}  // namespace deco::cpu
