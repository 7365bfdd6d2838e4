// One decoder block on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/adaln_block.h"
#include "deco/cuda/call.h"

namespace deco::cuda {

// h and cond have one dtype, bfloat16 or float16, which is the compute dtype; their rows are aligned to 16 bytes.
struct AdalnBlockForward {
  int64_t rows = 0;
  int width = 0;              // D: 16, 32 or 64
  Rows h, cond;               // [rows, D]
  BlockWeightArrays weights;  // N = 1
  void* out = nullptr;        // written: [rows, D] contiguous, dtype of h
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
  void* grad_h = nullptr;          // written: [rows, D] contiguous
  void* grad_cond = nullptr;       // written unless null
  BlockWeightArrays grad_weights;  // written unless null
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

int64_t adaln_block_forward_workspace(int width);
Status adaln_block_forward(const Call& call, const AdalnBlockForward& op);
int64_t adaln_block_backward_workspace(const DeviceLimits& limits, int64_t rows, int width);
Status adaln_block_backward(const Call& call, const AdalnBlockBackward& op);

}  // namespace deco::cuda
