// Shared by the launchers of the flow-matching loss: sizes, access to the images, and the incoming gradients.
#pragma once

#include "cuda/decoder_geometry.h"
#include "cuda/frequency_forms.h"
#include "cuda/launch.h"
#include "deco/cuda/flow_matching_loss.h"

namespace deco::cuda {

// Kernels that use the frequency forms: one thread block per multiprocessor, which builds the forms once.
constexpr int kLossThreads = 256, kLossWarps = kLossThreads / 32;

struct LossPlan {
  const FlowMatchingLossInputs& inputs;
  int64_t padded_height, padded_width;
  BlockGrid grid;  // of the padded images

  explicit LossPlan(const FlowMatchingLossInputs& loss)
      : inputs(loss),
        padded_height((loss.height + kBlockSide - 1) / kBlockSide * kBlockSide),
        padded_width((loss.width + kBlockSide - 1) / kBlockSide * kBlockSide),
        grid(loss.batch, padded_height, padded_width) {}

  int64_t padded_pixels() const { return inputs.batch * padded_height * padded_width; }
  bool is_too_large() const { return padded_pixels() >= kPixelLimit; }
  // 1 / number of values in a mean.
  float pixel_norm() const { return static_cast<float>(1.0 / (3.0 * inputs.batch * inputs.height * inputs.width)); }
  float frequency_norm() const { return static_cast<float>(1.0 / (3.0 * padded_pixels())); }

  // Whether ImagePair can read the images. If not, their padded difference is written to the workspace first.
  bool reads_in_place() const {
    const auto is_aligned = [](const ImageArray& image) {
      const Image bytes(image);
      const auto address = reinterpret_cast<uintptr_t>(image.data);
      return image.stride_x == 1 && (address | bytes.stride_b | bytes.stride_c | bytes.stride_y) % 16 == 0;
    };
    const DType pred = inputs.pred.dtype, target = inputs.target.dtype;
    return padded_height == inputs.height && padded_width == inputs.width && is_aligned(inputs.pred) &&
           is_aligned(inputs.target) && pred != DType::kFloat32 && (target == pred || target == DType::kFloat32);
  }

  // Calls run(images) with the ImagePair of the inputs' dtypes.
  template <class Run>
  Status with_image_pair(Run&& run) const {
    const Image pred(inputs.pred), target(inputs.target);
    const bool single = inputs.target.dtype == DType::kFloat32;
    if (inputs.pred.dtype == DType::kBFloat16)
      return single ? run(ImagePair<BFloat16, float>{pred, target}) : run(ImagePair<BFloat16, BFloat16>{pred, target});
    return single ? run(ImagePair<Float16, float>{pred, target}) : run(ImagePair<Float16, Float16>{pred, target});
  }

  // The padded difference in the workspace: float32 [B, 3, H', W'].
  int64_t difference_values() const { return kColors * padded_pixels(); }
  PaddedDifference padded_difference(float* values) const {
    ImageArray image = contiguous_image({values, DType::kFloat32}, padded_height, padded_width);
    return {Image(image), static_cast<uint32_t>(inputs.height), static_cast<uint32_t>(inputs.width)};
  }

  static ImageArray contiguous_image(const Array& array, int64_t height, int64_t width) {
    return {array.data, array.dtype, kColors * height * width, height * width, width, 1};
  }

  LaunchSize launch_size(const Call& call, int shared_bytes) const {
    return {grid_blocks(grid.groups, kLossWarps, call.limits, 1), kLossThreads, shared_bytes};
  }
};

// Weight of an image; 1 without sample weights.
DECO_DEVICE float weight_of(const Array& sample_weight, uint32_t image) {
  return sample_weight.data == nullptr ? 1.0f : load_float(sample_weight, image);
}
template <class V>
void visit_array(V& buffers, bool write, const Array& array, int64_t count) {
  const int64_t bytes = count * size_of(array.dtype);
  write ? buffers.write(array.data, bytes) : buffers.read(array.data, bytes);
}

// Incoming gradients of the three losses, and the factors of the gradients of an image of weight 1.
struct LossGradients {
  const float *total = nullptr, *pixel = nullptr, *frequency = nullptr;  // null: zero
  float known_total = 0, known_frequency = 0;                            // added to these two
  float frequency_scale = 0, pixel_norm = 0, frequency_norm = 0;

  // Gradients with respect to the image's sums of d² and of W·(F R M d)².
  struct Factors {
    float pixel, frequency;
  };

  LossGradients() = default;
  LossGradients(const LossPlan& plan, const FlowMatchingLossBackward& op)
      : total(op.grad_total),
        pixel(op.grad_pixel),
        frequency(op.grad_frequency),
        frequency_scale(op.frequency_scale),
        pixel_norm(plan.pixel_norm()),
        frequency_norm(plan.frequency_norm()) {}
  // Known on the host.
  LossGradients(const LossPlan& plan, float loss_frequency_scale, float grad_total, float grad_frequency)
      : known_total(grad_total),
        known_frequency(grad_frequency),
        frequency_scale(loss_frequency_scale),
        pixel_norm(plan.pixel_norm()),
        frequency_norm(plan.frequency_norm()) {}

  DECO_DEVICE Factors sum_factors() const {
    const float of_total = known_total + (total == nullptr ? 0.0f : load(total)),
                of_pixel = pixel == nullptr ? 0.0f : load(pixel),
                of_frequency = known_frequency + (frequency == nullptr ? 0.0f : load(frequency));
    return {pixel_norm * (of_total + of_pixel), frequency_norm * fmaf(frequency_scale, of_total, of_frequency)};
  }
  // Factors of d and of Rᵀ Mᵀ Fᵀ(W·F R M d) in the gradient of d: twice sum_factors, the sums being of squares.
  DECO_DEVICE Factors factors() const {
    const Factors of_sums = sum_factors();
    return {2.0f * of_sums.pixel, 2.0f * of_sums.frequency};
  }

  // Whether the only gradient that is not null, of total or frequency, is 1.
  DECO_DEVICE bool incoming_is_one() const { return load(total != nullptr ? total : frequency) == 1.0f; }

  template <class V>
  void visit(V& buffers) const {
    for (const float* gradient : {total, pixel, frequency}) buffers.read(gradient, sizeof(float));
  }
};

// ---- launchers ------------------------------------------------------------------------------------------------------

// Writes the padded difference of the images.
Status write_difference(const Call& call, const LossPlan& plan, float* difference);
// Writes two sums per group, of d² and of W·(F R M d)², without sample weights: from the padded difference if
// `difference` is not null, otherwise from the images.
Status sum_groups(const Call& call, const LossPlan& plan, float* difference, Float2* sums);
// The losses from the sums of all groups of a batch. `batch_plan` has its sizes and sample weights; null: not computed.
struct LossScalars {
  float frequency_scale = 0;
  float *total = nullptr, *pixel = nullptr, *frequency = nullptr;
};
Status write_losses(const Call& call, const LossPlan& batch_plan, const LossScalars& losses, const Float2* sums,
                    uint32_t groups_per_image);

// Images that ImagePair can read: writes the gradients that are not null, in the images' dtypes, and the sums of
// sum_groups unless null. grad_pred may be pred. `kept`: writes nothing if gradients.incoming_is_one().
Status write_gradients(const Call& call, const LossPlan& plan, const LossGradients& gradients, const Image& grad_pred,
                       const Image& grad_target, Float2* sums, bool kept = false);
// Writes the gradients of the images from the gradient of the padded difference and that of the pixel loss.
Status fold_gradients(const Call& call, const LossPlan& plan, const FlowMatchingLossBackward& op, float* difference);

// Sums of w·(F M d)² of the padded difference, [frequency_parts][3, 8, 8], and the gradient of frequency_weight from
// them; `sum`: scratch memory [3, 8, 8].
int frequency_parts(const Call& call, const LossPlan& plan);
Status sum_frequencies(const Call& call, const LossPlan& plan, float* difference, float* partials, bool accumulate);
Status frequency_weight_gradient(const Call& call, const LossGradients& gradients, const float* partials, int parts,
                                 float* sum, const Array& gradient);
// The gradient of sample_weight [B] from the sums of all groups.
Status sample_weight_gradient(const Call& call, const LossGradients& gradients, const Float2* sums, int64_t batch,
                              uint32_t groups_per_image, const Array& gradient);

}  // namespace deco::cuda
