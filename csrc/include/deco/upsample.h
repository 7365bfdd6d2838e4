// Learned linear map from tokens to pixels (DeCo, arXiv 2511.19365, section 3) as an argument of the fused ops.
#pragma once

#include "deco/array.h"

namespace deco {

struct UpsampleArrays {
  int64_t tokens = 0;        // T
  int64_t token_width = 0;   // Z: any
  int pixels_per_token = 0;  // P
  int width = 0;             // D: 16, 32 or 64
  Rows rows;                 // [T, Z]; its dtype is the activation dtype
  Array weight;              // [P*D, Z], row k*D + d for channel d of pixel k
  Array bias;                // [P*D]
  PixelRows cond;            // written unless its data is null: the upsampled tokens, [T, P, D]

  template <class Visit>
  void fields(Visit&& visit) {
    visit("upsample_sizes", tokens, token_width, pixels_per_token, width);
    visit("tokens", rows);
    visit("upsample_weights", weight, bias);
    visit("cond", cond);
  }
};

}  // namespace deco
