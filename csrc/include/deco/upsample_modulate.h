// Token-to-pixel upsample, LayerNorm and modulation of one decoder block on the CPU (DeCo, arXiv 2511.19365,
// section 3).
#pragma once

#include "deco/adaln_block.h"
#include "deco/upsample.h"

namespace deco::cpu {

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

struct UpsampleModulateBackward {
  UpsampleArrays upsample;
  PixelRows grad_modulated, grad_gate, h;  // [T, P, D]
  BlockWeightArrays weights;
  // Written; gradients with null data are not computed. grad_cond: gradient of the upsampled tokens.
  PixelRows grad_h, grad_cond;
  BlockWeightArrays grad_weights;
  float eps = 0;
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    upsample.fields(visit);
    visit("grad_modulated", grad_modulated);
    visit("grad_gate", grad_gate);
    visit("h", h);
    weights.modulation("weights", visit);
    visit("grad_h", grad_h);
    visit("grad_cond", grad_cond);
    grad_weights.modulation("grad_weights", visit);
    visit("eps", eps);
    visit("threads", threads);
  }
};

void upsample_modulate_forward(const UpsampleModulateForward& call);
void upsample_modulate_backward(const UpsampleModulateBackward& call);

}  // namespace deco::cpu
