// upsample_modulate on CUDA devices after its matmul, which the caller runs.
#pragma once

#include "deco/cuda/call.h"
#include "deco/upsample_modulate.h"

namespace deco::cuda {

// h and cond are bfloat16 or float16, which is the compute dtype; their rows are aligned to 16 bytes. grad_h is always
// written.
int64_t modulate_forward_workspace(int width);
Status modulate_forward(const Call& call, const ModulateForward& op);
int64_t modulate_backward_workspace(const DeviceLimits& limits, int64_t rows, int width);
Status modulate_backward(const Call& call, const ModulateBackward& op);

}  // namespace deco::cuda
