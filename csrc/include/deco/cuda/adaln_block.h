// One decoder block on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/adaln_block.h"
#include "deco/cuda/call.h"

namespace deco::cuda {

// h and cond have one dtype, bfloat16 or float16, which is the compute dtype; their rows and those of the results are
// aligned to 16 bytes. grad_h is always written.
int64_t adaln_block_forward_workspace(int width);
Status adaln_block_forward(const Call& call, const AdalnBlockForward& op);
int64_t adaln_block_backward_workspace(const DeviceLimits& limits, int64_t rows, int width);
Status adaln_block_backward(const Call& call, const AdalnBlockBackward& op);

}  // namespace deco::cuda
