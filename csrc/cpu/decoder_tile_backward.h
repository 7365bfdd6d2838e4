// Decoder backward on one tile of T pixels, from one SavedBlockTile per decoder block that forward_block has filled.
// With u = update, z = W_1 m + b_1, a = hidden = SiLU(z), x = normalized, l = LayerNorm(h) = x norm_weight + norm_bias:
//
//   du = gate dh                 dgate = u dh                                 residual_backward
//   dz = SiLU'(z) (W_2^T du)                                                  hidden_backward
//   dm = W_1^T dz                dshift = dm, dscale = l dm                   modulate_backward
//   dx = norm_weight (1 + scale) dm
//   dh += rstd (dx - mean(dx) - x mean(x dx))                                 norm_backward
//   dSiLU(y) += W_mod^T [dshift, dscale, dgate]                               modulation_backward
//   dW_2 += du a^T,  dW_1 += dz m^T,  dW_mod += [dshift, dscale, dgate] SiLU(y)^T
//
// Per pixel and decoder block: 10 D^2 multiply-adds. Deterministic: sums over pixels run tile by tile in a fixed order.
#pragma once

#include "cpu/decoder_tile.h"
#include "cpu/gradients.h"

namespace deco::cpu::DECO_CPU_ISA {

// Working memory of one thread in the backward of one decoder block.
template <class Operand, int D, int T>
struct alignas(64) BlockBackwardTile {
  using Element = typename Operand::Element;
  float grad_h[D][T];
  float grad_normalized[D][T];
  float grad_silu_cond[D][T];        // summed over the decoder blocks
  float silu_cond_derivative[D][T];  // SiLU'(y)
  Element silu_cond[D / Operand::kPack][T];
  GradientTile<Operand, D, T> grad_update, grad_z;
  GradientTile<Operand, 3 * D, T> grad_modulation;  // rows shift, scale, gate
  Element silu_cond_by_pixel[T / Operand::kPack][D], factor_by_pixel[T / Operand::kPack][D];
};

// Gradients of update and gate, and of their biases.
template <class Operand, int D, int T>
void residual_backward(const SavedBlockTile<Operand, D, T>& saved, int pixels, BlockBackwardTile<Operand, D, T>& tile,
                       BlockGradients<D>& gradients) {
  for (int d = 0; d < D; d += 2) {
    VecF update_sums[2], gate_sums[2];
    unroll<2>([&](auto i) DECO_INLINE_LAMBDA { update_sums[i] = gate_sums[i] = broadcast(0.0f); });
    for (int pixel = 0; pixel < pixels; pixel += kStrip) {
      VecF update[2][2], gate[2][2];
      unroll<4>([&](auto j) DECO_INLINE_LAMBDA {
        constexpr int i = j / 2, v = j % 2;
        const int p = pixel + v * kLanes;
        const VecF grad_h = load(&tile.grad_h[d + i][p]);
        update[i][v] = load(&saved.gate[d + i][p]) * grad_h;
        gate[i][v] = load(&saved.update[d + i][p]) * grad_h;
        update_sums[i] = update_sums[i] + update[i][v];
        gate_sums[i] = gate_sums[i] + gate[i][v];
      });
      tile.grad_update.put_strip(d, pixel, update[0], update[1]);
      tile.grad_modulation.put_strip(2 * D + d, pixel, gate[0], gate[1]);
    }
    unroll<2>([&](auto i) DECO_INLINE_LAMBDA {
      accumulate(gradients.fc2_bias[d + i], update_sums[i]);
      accumulate(gradients.mod_bias[2 * D + d + i], gate_sums[i]);
    });
  }
}

template <class Operand, int D, int T>
void hidden_backward(const TransposedBlockWeights<Operand>& w, const SavedBlockTile<Operand, D, T>& saved, int pixels,
                     BlockBackwardTile<Operand, D, T>& tile, BlockGradients<D>& gradients) {
  const auto grad_hidden_at = [&](int pixel) DECO_INLINE_LAMBDA {
    return transposed_product<Operand, D, D, T>(w.fc2, strip_of(tile.grad_update.by_channel, pixel));
  };
  for_each_group<Operand, D>(
      pixels, grad_hidden_at, [&](const auto& grad_hidden, int first, int pixel) DECO_INLINE_LAMBDA {
        GroupSums sums;
        clear_sums(sums);
        grad_hidden.add_to(sums, first, first + kGroup / 2);
        unroll<kGroup / 2>([&](auto pair) DECO_INLINE_LAMBDA {
          const int d = first + 2 * pair;
          VecF grad_z[2][2];
          unroll<4>([&](auto j) DECO_INLINE_LAMBDA {
            constexpr int i = j / 2, v = j % 2;
            grad_z[i][v] = sums[4 * pair + j] * load(&saved.hidden_derivative[d + i][pixel + v * kLanes]);
          });
          tile.grad_z.put_strip(d, pixel, grad_z[0], grad_z[1]);
          unroll<2>([&](auto i)
                        DECO_INLINE_LAMBDA { accumulate(gradients.fc1_bias[d + i], grad_z[i][0] + grad_z[i][1]); });
        });
      });
}

// Gradients of shift, scale, normalized and their biases from dm of channels `first` and first + 1, on the strip at
// `pixel`.
template <class Operand, int D, int T>
DECO_INLINE void modulate_backward_strip(const BlockWeights<Operand>& w, const SavedBlockTile<Operand, D, T>& saved,
                                         int first, int pixel, const VecF (&grad_m)[2][2],
                                         BlockBackwardTile<Operand, D, T>& tile, BlockGradients<D>& gradients) {
  VecF scale[2][2];
  unroll<2>([&](auto i) DECO_INLINE_LAMBDA {
    const int d = first + i;
    const VecF norm_weight = broadcast(w.norm_weight[d]), norm_bias = broadcast(w.norm_bias[d]);
    VecF norm_weight_sum = broadcast(0.0f), norm_bias_sum = broadcast(0.0f);
    unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
      const int p = pixel + v * kLanes;
      const VecF normalized = load(&saved.normalized[d][p]);
      const VecF grad_l = grad_m[i][v] * load(&saved.scale[d][p]);
      scale[i][v] = grad_m[i][v] * fma(norm_weight, normalized, norm_bias);
      norm_weight_sum = fma(grad_l, normalized, norm_weight_sum);
      norm_bias_sum = norm_bias_sum + grad_l;
      store(&tile.grad_normalized[d][p], grad_l * norm_weight);
    });
    accumulate(gradients.norm_weight[d], norm_weight_sum);
    accumulate(gradients.norm_bias[d], norm_bias_sum);
    accumulate(gradients.mod_bias[d], grad_m[i][0] + grad_m[i][1]);
    accumulate(gradients.mod_bias[D + d], scale[i][0] + scale[i][1]);
  });
  tile.grad_modulation.put_strip(first, pixel, grad_m[0], grad_m[1]);
  tile.grad_modulation.put_strip(D + first, pixel, scale[0], scale[1]);
}

template <class Operand, int D, int T>
void modulate_backward(const BlockWeights<Operand>& w, const TransposedBlockWeights<Operand>& transposed,
                       const SavedBlockTile<Operand, D, T>& saved, int pixels, BlockBackwardTile<Operand, D, T>& tile,
                       BlockGradients<D>& gradients) {
  const auto grad_modulated_at = [&](int pixel) DECO_INLINE_LAMBDA {
    return transposed_product<Operand, D, D, T>(transposed.fc1, strip_of(tile.grad_z.by_channel, pixel));
  };
  for_each_group<Operand, D>(
      pixels, grad_modulated_at, [&](const auto& grad_modulated, int first, int pixel) DECO_INLINE_LAMBDA {
        GroupSums sums;
        clear_sums(sums);
        grad_modulated.add_to(sums, first, first + kGroup / 2);
        unroll<kGroup / 2>([&](auto pair) DECO_INLINE_LAMBDA {
          const VecF grad_m[2][2] = {{sums[4 * pair], sums[4 * pair + 1]}, {sums[4 * pair + 2], sums[4 * pair + 3]}};
          modulate_backward_strip(w, saved, first + 2 * pair, pixel, grad_m, tile, gradients);
        });
      });
}

// grad_h = [grad_h +] rstd (dx - mean(dx) - x mean(x dx)), the means over the channels; RMSNorm (kCenter false) has no
// mean(dx).
template <bool kAdd, bool kCenter, int D, int T>
void norm_backward(const float (*grad_normalized)[T], const float (*normalized)[T], const float* rstd, int pixels,
                   float (*grad_h)[T]) {
  for (int pixel = 0; pixel < pixels; pixel += kLanes) {
    VecF sums[2], products[2];
    unroll<2>([&](auto i) DECO_INLINE_LAMBDA { sums[i] = products[i] = broadcast(0.0f); });
    for (int d = 0; d < D; d += 2)
      unroll<2>([&](auto i) DECO_INLINE_LAMBDA {
        const VecF gradient = load(&grad_normalized[d + i][pixel]);
        sums[i] = sums[i] + gradient;
        products[i] = fma(gradient, load(&normalized[d + i][pixel]), products[i]);
      });
    const VecF mean = kCenter ? (sums[0] + sums[1]) * broadcast(1.0f / D) : broadcast(0.0f);
    const VecF mean_product = (products[0] + products[1]) * broadcast(1.0f / D), scale = load(rstd + pixel);
    for (int d = 0; d < D; ++d) {
      const VecF gradient = load(&grad_normalized[d][pixel]) - mean;
      const VecF centered = fnma(load(&normalized[d][pixel]), mean_product, gradient) * scale;
      store(&grad_h[d][pixel], kAdd ? load(&grad_h[d][pixel]) + centered : centered);
    }
  }
}

template <class Operand, int D, int T>
void modulation_backward(const TransposedBlockWeights<Operand>& w, int pixels, BlockBackwardTile<Operand, D, T>& tile) {
  const auto from_modulation_at = [&](int pixel) DECO_INLINE_LAMBDA {
    return transposed_product<Operand, D, 3 * D, T>(w.mod, strip_of(tile.grad_modulation.by_channel, pixel));
  };
  for_each_group<Operand, D>(pixels, from_modulation_at,
                             [&](const auto& from_modulation, int first, int pixel) DECO_INLINE_LAMBDA {
                               GroupSums sums;
                               unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA {
                                 sums[i] = load(&tile.grad_silu_cond[first + i / 2][pixel + i % 2 * kLanes]);
                               });
                               from_modulation.add_to(sums, first, first + kGroup / 2);
                               unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA {
                                 store(&tile.grad_silu_cond[first + i / 2][pixel + i % 2 * kLanes], sums[i]);
                               });
                             });
}

// Gradients of a decoder block to compute besides grad_h.
struct WantedGradients {
  bool cond, matrices;
};

// Before the first decoder block of a tile: zeros the gradient of SiLU(cond) and transposes SiLU(cond), a factor of
// W_mod's gradient in every decoder block, to pixel-major once.
template <class Operand, int D, int T>
void start_backward(int pixels, WantedGradients wanted, BlockBackwardTile<Operand, D, T>& tile) {
  if (wanted.cond) std::memset(tile.grad_silu_cond, 0, sizeof(tile.grad_silu_cond));
  if (wanted.matrices) make_pixel_major<D, T>(Operand{}, tile.silu_cond, pixels, tile.silu_cond_by_pixel);
}

// Replaces tile.grad_h, the gradient of the decoder block's output, by the gradient of its input.
template <class Operand, int D, int T>
void backward_block(const BlockWeights<Operand>& w, const TransposedBlockWeights<Operand>& transposed,
                    const SavedBlockTile<Operand, D, T>& saved, int pixels, WantedGradients wanted,
                    BlockBackwardTile<Operand, D, T>& tile, BlockGradients<D>& gradients) {
  residual_backward(saved, pixels, tile, gradients);
  if (wanted.matrices) {
    make_pixel_major<D, T>(Operand{}, saved.hidden, pixels, tile.factor_by_pixel);
    add_weight_gradient<Operand, D, D, T>(tile.grad_update.by_pixel(), tile.factor_by_pixel, pixels,
                                          gradients.fc2_weight);
  }
  hidden_backward(transposed, saved, pixels, tile, gradients);
  if (wanted.matrices) {
    make_pixel_major<D, T>(Operand{}, saved.modulated, pixels, tile.factor_by_pixel);
    add_weight_gradient<Operand, D, D, T>(tile.grad_z.by_pixel(), tile.factor_by_pixel, pixels, gradients.fc1_weight);
  }
  modulate_backward(w, transposed, saved, pixels, tile, gradients);
  if (wanted.matrices)
    add_weight_gradient<Operand, 3 * D, D, T>(tile.grad_modulation.by_pixel(), tile.silu_cond_by_pixel, pixels,
                                              gradients.mod_weight);
  norm_backward<true, true, D, T>(tile.grad_normalized, saved.normalized, saved.rstd, pixels, tile.grad_h);
  if (wanted.cond) modulation_backward(transposed, pixels, tile);
}

// After the last decoder block: replaces the gradient of SiLU(cond) by that of cond, in place.
template <class Operand, int D, int T>
void finish_grad_cond(int pixels, BlockBackwardTile<Operand, D, T>& tile) {
  for (int d = 0; d < D; ++d)
    for (int pixel = 0; pixel < pixels; pixel += kLanes) {
      float* gradient = &tile.grad_silu_cond[d][pixel];
      store(gradient, load(gradient) * load(&tile.silu_cond_derivative[d][pixel]));
    }
}

// normalized = (h - mean) rstd, the input of the head's matmul.
template <int D, int T>
void normalize(bool rms_norm, const float (*h)[T], float eps, int pixels, float* mean, float* rstd,
               float (*normalized)[T]) {
  head_statistics<D, T>(rms_norm, h, eps, pixels, mean, rstd);
  for (int pixel = 0; pixel < pixels; pixel += kLanes)
    for (int d = 0; d < D; ++d)
      store(&normalized[d][pixel], (load(&h[d][pixel]) - load(mean + pixel)) * load(rstd + pixel));
}

// Gradients of the head's weights and of its normalized input from the gradient of the velocity.
template <int D, int T>
void head_backward(int channels, const float* weight, const float (*grad_velocity)[T], const float (*normalized)[T],
                   int pixels, float (*grad_normalized)[T], QueryHeadGradients<D>& gradients) {
  with_channels(channels, [&](auto count) {
    constexpr int C = count;
    for (int pixel = 0; pixel < pixels; pixel += kLanes)
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { accumulate(gradients.head_bias[c], load(&grad_velocity[c][pixel])); });
    for (int d = 0; d < D; ++d) {
      VecF sums[C];
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { sums[c] = broadcast(0.0f); });
      for (int pixel = 0; pixel < pixels; pixel += kLanes) {
        const VecF x = load(&normalized[d][pixel]);
        VecF gradient = broadcast(0.0f);
        unroll<C>([&](auto c) DECO_INLINE_LAMBDA {
          const VecF grad_v = load(&grad_velocity[c][pixel]);
          gradient = fma(broadcast(weight[c * D + d]), grad_v, gradient);
          sums[c] = fma(grad_v, x, sums[c]);
        });
        store(&grad_normalized[d][pixel], gradient);
      }
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { accumulate(gradients.head_weight[c][d], sums[c]); });
    }
  });
}

// Gradients of pixel_weight, the table's panel (accumulated) and the pixels from grad_h.
template <int D, int T>
void query_backward(int channels, const float* pixel_weight, const float (*rgb)[T], const float (*grad_h)[T],
                    int pixels, float (*grad_panel)[T], float (*grad_rgb)[T], QueryHeadGradients<D>& gradients) {
  with_channels(channels, [&](auto count) {
    constexpr int C = count;
    for (int pixel = 0; pixel < pixels; pixel += kLanes) {
      VecF sums[C];
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { sums[c] = broadcast(0.0f); });
      for (int d = 0; d < D; ++d) {
        const VecF gradient = load(&grad_h[d][pixel]);
        accumulate(&grad_panel[d][pixel], gradient);
        unroll<C>([&](auto c)
                      DECO_INLINE_LAMBDA { sums[c] = fma(broadcast(pixel_weight[d * C + c]), gradient, sums[c]); });
      }
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { store(&grad_rgb[c][pixel], sums[c]); });
    }
    for (int d = 0; d < D; ++d) {
      VecF sums[C];
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { sums[c] = broadcast(0.0f); });
      for (int pixel = 0; pixel < pixels; pixel += kLanes)
        unroll<C>([&](auto c)
                      DECO_INLINE_LAMBDA { sums[c] = fma(load(&grad_h[d][pixel]), load(&rgb[c][pixel]), sums[c]); });
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { accumulate(gradients.pixel_weight[c][d], sums[c]); });
    }
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
