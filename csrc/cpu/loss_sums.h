// Flow-matching loss, part 3: from sums over the pixels of each sample to the losses.
#pragma once

#include <cstdint>

#include "cpu/vec.h"

namespace deco::cpu::DECO_CPU_ISA {

// Sums over all pixels of one sample: of d^2, and of W (F R M d)^2.
struct SampleSums {
  double pixel, frequency;
};

// Sums of one sample over all parts; `sums` is [parts][B].
inline SampleSums total_of(const SampleSums* sums, int64_t batch, int parts, int64_t sample) {
  SampleSums total = {0.0, 0.0};
  for (int part = 0; part < parts; ++part) {
    total.pixel += sums[part * batch + sample].pixel;
    total.frequency += sums[part * batch + sample].frequency;
  }
  return total;
}

// 1 / (B * elements per sample), without and with padding; zeros for an empty batch.
struct Normalization {
  double pixel = 0.0, frequency = 0.0;

  Normalization(int64_t batch, int64_t pixels, int64_t padded_pixels) {
    if (batch == 0) return;
    pixel = 1.0 / (3.0 * batch * pixels);
    frequency = 1.0 / (3.0 * batch * padded_pixels);
  }
};

// Weight of a sample; null: 1.
inline double weight_of(const float* sample_weight, int64_t sample) {
  return sample_weight == nullptr ? 1.0 : sample_weight[sample];
}

// The losses, where not null, from the sums of the parts, [parts][B].
inline void write_losses(const SampleSums* sums, int64_t batch, int parts, const float* sample_weight,
                         const Normalization& normalization, double frequency_scale, float* total, float* pixel,
                         float* frequency) {
  double pixel_loss = 0.0, frequency_loss = 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    const SampleSums sample = total_of(sums, batch, parts, b);
    pixel_loss += weight_of(sample_weight, b) * normalization.pixel * sample.pixel;
    frequency_loss += weight_of(sample_weight, b) * normalization.frequency * sample.frequency;
  }
  const auto write = [](float* loss, double value) {
    if (loss != nullptr) *loss = static_cast<float>(value);
  };
  write(total, pixel_loss + frequency_scale * frequency_loss);
  write(pixel, pixel_loss);
  write(frequency, frequency_loss);
}

// The gradient of sample_weight, for gradients of the losses times their normalization.
inline void write_grad_sample_weight(const SampleSums* sums, int64_t batch, int parts, double pixel_factor,
                                     double frequency_factor, float* gradient) {
  if (gradient == nullptr) return;
  for (int64_t b = 0; b < batch; ++b) {
    const SampleSums total = total_of(sums, batch, parts, b);
    gradient[b] = static_cast<float>(pixel_factor * total.pixel + frequency_factor * total.frequency);
  }
}

// The gradient of frequency_weight from the sums of the parts, [parts][count].
inline void write_grad_frequency_weight(const double* sums, int count, int parts, double frequency_factor,
                                        float* gradient) {
  if (gradient == nullptr) return;
  for (int k = 0; k < count; ++k) {
    double sum = 0.0;
    for (int part = 0; part < parts; ++part) sum += sums[part * count + k];
    gradient[k] = static_cast<float>(frequency_factor * sum);
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
