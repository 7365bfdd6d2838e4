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

namespace cpu {

// y = W_up token + b_up, written to `cond`, whose bits do not depend on `width`.
struct UpsampleForward : Threaded<UpsampleArrays> {};

// Gradients of y = W_up token + b_up from dy:
//   dtoken = W_up^T dy,  dW_up = sum over tokens dy token^T,  db_up = sum over tokens dy
struct UpsampleBackward {
  int64_t tokens = 0;       // T
  int64_t token_width = 0;  // Z: any
  int64_t outputs = 0;      // P*D, a multiple of 16
  Rows grad_cond;           // dy, [T, P*D]
  Rows rows;                // [T, Z]; its dtype is the activation dtype
  Array weight;             // [P*D, Z], rounded to the activation dtype
  // Written, dense; gradients with null data are not computed.
  Array grad_tokens;  // [T, Z]
  Array grad_weight;  // [P*D, Z]
  Array grad_bias;    // [P*D]
  int adds = 0;       // 1: adds to what grad_weight and grad_bias, in float32, hold
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("upsample_sizes", tokens, token_width, outputs);
    visit("grad_cond", grad_cond);
    visit("tokens", rows);
    visit("up_weight", weight);
    visit("grad_tokens", grad_tokens);
    visit("grad_weights", grad_weight, grad_bias);
    visit("adds", adds);
    visit("threads", threads);
  }
};

void upsample_forward(const UpsampleForward& call);
void upsample_backward(const UpsampleBackward& call);

}  // namespace cpu
}  // namespace deco
