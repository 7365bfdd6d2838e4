// Flow-matching loss in pixels and in the 8x8 DCT domain of YCbCr on the CPU (DeCo, arXiv 2511.19365, section 3).
#pragma once

#include "deco/array.h"

namespace deco::cpu {

// Inputs of forward and backward. Images are [B, 3, H, W]; H and W are at least 5 or divisible by 8.
struct FlowMatchingLossInputs {
  int64_t batch = 0, height = 0, width = 0;
  ImageArray pred, target;
  const float* frequency_weight = nullptr;  // [3, 8, 8] for Y, Cb, Cr; row = vertical frequency
  const float* sample_weight = nullptr;     // [B]; null: ones
  double* workspace = nullptr;              // loss_workspace_size(batch, threads) zeros
  int threads = 1;

  template <class Visit>
  void fields(Visit&& visit) {
    visit("shape", batch, height, width);
    visit("pred", pred);
    visit("target", target);
    visit("frequency_weight", frequency_weight);
    visit("sample_weight", sample_weight);
  }
};

struct FlowMatchingLossForward {
  FlowMatchingLossInputs inputs;
  double frequency_scale = 1;
  // Written; null: not computed.
  float* total = nullptr;
  float* pixel = nullptr;
  float* frequency = nullptr;
  // With grad_pred, also the gradient of grad_pixel * pixel + grad_frequency * frequency, in the same pass.
  double grad_pixel = 0;
  double grad_frequency = 0;
  Array grad_pred;  // written, [B, 3, H, W] contiguous; null: not computed

  template <class Visit>
  void fields(Visit&& visit) {
    inputs.fields(visit);
    visit("frequency_scale", frequency_scale);
    visit("total", total);
    visit("pixel", pixel);
    visit("frequency", frequency);
    visit("grad_pixel", grad_pixel);
    visit("grad_frequency", grad_frequency);
    visit("grad_pred", grad_pred);
    visit("threads", inputs.threads);
  }
};

struct FlowMatchingLossBackward {
  FlowMatchingLossInputs inputs;
  double grad_pixel = 0;      // gradient of the pixel loss, including its part of the total
  double grad_frequency = 0;  // gradient of the frequency loss, likewise
  // Written; null: not computed.
  Array grad_pred, grad_target;            // [B, 3, H, W] contiguous
  float* grad_frequency_weight = nullptr;  // [3, 8, 8]
  float* grad_sample_weight = nullptr;     // [B]

  template <class Visit>
  void fields(Visit&& visit) {
    inputs.fields(visit);
    visit("grad_pixel", grad_pixel);
    visit("grad_frequency", grad_frequency);
    visit("grad_images", grad_pred, grad_target);
    visit("grad_frequency_weight", grad_frequency_weight);
    visit("grad_sample_weight", grad_sample_weight);
    visit("threads", inputs.threads);
  }
};

// Doubles of workspace: the sums of every sample and every frequency, per thread.
inline int64_t loss_workspace_size(int64_t batch, int threads) { return threads * (2 * batch + 3 * 8 * 8); }

void flow_matching_loss_forward(const FlowMatchingLossForward& call);
void flow_matching_loss_backward(const FlowMatchingLossBackward& call);

}  // namespace deco::cpu
