// LayerNorm and modulation of one decoder block on CUDA devices (DeCo, arXiv 2511.19365, section 3): upsample_modulate
// after its matmul, which the caller runs. cond: the upsampled tokens.
#pragma once

#include "deco/adaln_block.h"
#include "deco/cuda/call.h"

namespace deco::cuda {

// h and cond have one dtype, bfloat16 or float16, which is the compute dtype; their rows are aligned to 16 bytes.
struct ModulateForward {
  int64_t rows = 0;
  int width = 0;              // D: 16, 32 or 64
  Rows h, cond;               // [rows, D]
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
  int width = 0;
  Rows grad_modulated, grad_gate, h, cond;
  BlockWeightArrays weights;
  Rows grad_h;                     // written
  Rows grad_cond;                  // written unless its data is null
  BlockWeightArrays grad_weights;  // likewise
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

int64_t modulate_forward_workspace(int width);
Status modulate_forward(const Call& call, const ModulateForward& op);
int64_t modulate_backward_workspace(const DeviceLimits& limits, int64_t rows, int width);
Status modulate_backward(const Call& call, const ModulateBackward& op);

}  // namespace deco::cuda
