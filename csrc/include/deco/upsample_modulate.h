// Token-to-pixel upsample, LayerNorm and modulation of one decoder block (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/adaln_block.h"
#include "deco/upsample.h"

namespace deco {

// LayerNorm and modulation of rows: upsample_modulate after its matmul. cond: the upsampled tokens y.
//   (shift, scale, gate) = W_mod SiLU(y) + b_mod
//   modulated = LayerNorm(h) (1 + scale) + shift
struct ModulateForward {
  int64_t rows = 0;
  int width = 0;              // D: 16, 32 or 64
  Rows h, cond;               // [rows, D], of one dtype, the activation dtype
  BlockWeightArrays weights;  // N = 1, only norm and mod
  Rows modulated, gate;       // written: [rows, D], dtype of h
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("rows", rows);
    visit("D", width);
    visit("h", h);
    visit("cond", cond);
    weights.modulation("weights", visit);
    visit("modulated", modulated);
    visit("gate", gate);
    visit("eps", eps);
  }
};

struct ModulateBackward {
  int64_t rows = 0;
  int width = 0;                            // D: 16, 32 or 64
  Rows grad_modulated, grad_gate, h, cond;  // [rows, D]; h and cond of one dtype, the activation dtype
  BlockWeightArrays weights;                // N = 1, only norm and mod
  // Written; gradients with null data are not computed.
  Rows grad_h, grad_cond;  // [rows, D]
  BlockWeightArrays grad_weights;
  float eps = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("rows", rows);
    visit("D", width);
    visit("grad_modulated", grad_modulated);
    visit("grad_gate", grad_gate);
    visit("h", h);
    visit("cond", cond);
    weights.modulation("weights", visit);
    visit("grad_h", grad_h);
    visit("grad_cond", grad_cond);
    grad_weights.modulation("grad_weights", visit);
    visit("eps", eps);
  }
};

namespace cpu {

// ModulateForward of y = W_up token + b_up.
struct UpsampleModulateForward {
  UpsampleArrays upsample;
  PixelRows h;                // [T, P, D]
  BlockWeightArrays weights;  // N = 1, only norm and mod
  PixelRows modulated, gate;  // written
  float eps = 0;
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    upsample.fields(visit);
    visit("h", h);
    weights.modulation("weights", visit);
    visit("modulated", modulated);
    visit("gate", gate);
    visit("eps", eps);
    visit("threads", threads);
  }
};

struct ModulateForward : Threaded<deco::ModulateForward> {};
struct ModulateBackward : Threaded<deco::ModulateBackward> {};

void upsample_modulate_forward(const UpsampleModulateForward& call);
void modulate_forward(const ModulateForward& call);
void modulate_backward(const ModulateBackward& call);

}  // namespace cpu
}  // namespace deco
