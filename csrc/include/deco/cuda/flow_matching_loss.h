// Flow-matching loss in pixels and in the 8x8 DCT domain of YCbCr on CUDA devices (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/array.h"
#include "deco/cuda/call.h"

namespace deco::cuda {

// Inputs of forward and backward. Images are [B, 3, H, W]; H and W are at least 5 or divisible by 8.
struct FlowMatchingLossInputs {
  int64_t batch = 0, height = 0, width = 0;
  ImageArray pred, target;
  Array frequency_weight;  // [3, 8, 8] for Y, Cb, Cr; row = vertical frequency
  Array sample_weight;     // [B]; null: ones

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", batch, height, width);
    visit("pred", pred);
    visit("target", target);
    visit("weights", frequency_weight, sample_weight);
  }
};

struct FlowMatchingLossForward {
  FlowMatchingLossInputs inputs;
  float frequency_scale = 1;
  // Written: scalars on the device; null: not computed.
  float* total = nullptr;
  float* pixel = nullptr;
  float* frequency = nullptr;
  // With grad_pred, also the gradient of grad_total·total + grad_frequency·frequency, in the same pass. Only for inputs
  // of which loss_keeps_gradient is true.
  float grad_total = 0, grad_frequency = 0;
  Array grad_pred;  // written, [B, 3, H, W] contiguous, aligned to 16 bytes, with the dtype of pred; null: not computed

  template <class Visit>
  void fields(Visit&& visit) {
    inputs.fields(visit);
    visit("frequency_scale", frequency_scale);
    visit("losses", total, pixel, frequency);
    visit("grad_losses", grad_total, grad_frequency);
    visit("grad_pred", grad_pred);
  }
};

struct FlowMatchingLossBackward {
  FlowMatchingLossInputs inputs;
  float frequency_scale = 1;
  // Gradients of the three losses: scalars on the device; null: zero.
  const float* grad_total = nullptr;
  const float* grad_pixel = nullptr;
  const float* grad_frequency = nullptr;
  // Written; null: not computed.
  Array grad_pred, grad_target;  // [B, 3, H, W] contiguous, aligned to 16 bytes, with the dtype of their image
  Array grad_frequency_weight;   // [3, 8, 8]
  Array grad_sample_weight;      // [B]
  // Whether grad_pred holds the gradient for a single incoming gradient, the one that is not null, of 1; then it is
  // left as it is if that gradient is 1. Only for inputs of which loss_keeps_gradient is true.
  int grad_pred_is_kept = 0;

  template <class Visit>
  void fields(Visit&& visit) {
    inputs.fields(visit);
    visit("frequency_scale", frequency_scale);
    visit("grad_losses", grad_total, grad_pixel, grad_frequency);
    visit("gradients", grad_pred, grad_target, grad_frequency_weight, grad_sample_weight);
    visit("grad_pred_is_kept", grad_pred_is_kept);
  }
};

// Whether one pass over the images, read in place, gives losses and gradient.
bool loss_keeps_gradient(const FlowMatchingLossInputs& inputs);

int64_t flow_matching_loss_forward_workspace(const FlowMatchingLossForward& op);
Status flow_matching_loss_forward(const Call& call, const FlowMatchingLossForward& op);
int64_t flow_matching_loss_backward_workspace(const DeviceLimits& limits, const FlowMatchingLossBackward& op);
Status flow_matching_loss_backward(const Call& call, const FlowMatchingLossBackward& op);

}  // namespace deco::cuda
