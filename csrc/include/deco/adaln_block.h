// One decoder block: modulation by the condition, MLP, gated residual (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/array.h"

namespace deco {

// Weights of N decoder blocks, or their gradients; every array is contiguous and has its own dtype.
struct BlockWeightArrays {
  Array norm_weight;  // [N, D]
  Array norm_bias;    // [N, D]
  Array mod_weight;   // [N, 3D, D], rows shift, scale, gate
  Array mod_bias;     // [N, 3D]
  Array fc1_weight;   // [N, D, D] (out, in)
  Array fc1_bias;     // [N, D]
  Array fc2_weight;   // [N, D, D]
  Array fc2_bias;     // [N, D]

  template <class Visit>
  void fields(Visit&& visit) {
    modulation("weights", visit);
    visit("MLP", fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  }

  // Visits the weights before the MLP, the only ones of upsample_modulate.
  template <class Visit>
  void modulation(const char* name, Visit&& visit) {
    visit(name, norm_weight, norm_bias, mod_weight, mod_bias);
  }
};

struct AdalnBlockForward {
  int64_t rows = 0;
  int width = 0;              // D: 16, 32 or 64
  Rows h, cond;               // [rows, D], of one dtype, the activation dtype
  BlockWeightArrays weights;  // N = 1
  Rows out;                   // written, [rows, D]
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("rows", rows);
    visit("D", width);
    visit("h", h);
    visit("cond", cond);
    visit("weights", weights);
    visit("out", out);
    visit("eps", eps);
  }
};

struct AdalnBlockBackward {
  int64_t rows = 0;
  int width = 0;
  Rows grad_out, h, cond;
  BlockWeightArrays weights;
  // Written; gradients with null data are not computed.
  Rows grad_h, grad_cond;
  BlockWeightArrays grad_weights;
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("rows", rows);
    visit("D", width);
    visit("grad_out", grad_out);
    visit("h", h);
    visit("cond", cond);
    visit("weights", weights);
    visit("grad_h", grad_h);
    visit("grad_cond", grad_cond);
    visit("grad_weights", grad_weights);
    visit("eps", eps);
  }
};

namespace cpu {

struct AdalnBlockForward : Threaded<deco::AdalnBlockForward> {};
struct AdalnBlockBackward : Threaded<deco::AdalnBlockBackward> {};

void adaln_block_forward(const AdalnBlockForward& call);
void adaln_block_backward(const AdalnBlockBackward& call);

}  // namespace cpu
}  // namespace deco
