// Token-to-pixel upsample, modulation and LayerNorm of one decoder block on the CPU (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/upsample.h"

namespace deco {

// The weights of the first half of a block, or their gradients; every array is contiguous and has its own dtype.
struct ModulationArrays {
  Array norm_weight;  // [D]
  Array norm_bias;    // [D]
  Array mod_weight;   // [3D, D], rows shift, scale, gate
  Array mod_bias;     // [3D]
};

namespace cpu {

struct UpsampleModulateForward {
  UpsampleArrays upsample;
  PixelRows h;  // [T, P, D]
  ModulationArrays weights;
  PixelRows modulated, gate;  // written
  float eps = 0;
  int threads = 1;
};

void upsample_modulate_forward(const UpsampleModulateForward& call);

}  // namespace cpu
}  // namespace deco
