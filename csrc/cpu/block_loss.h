// Flow-matching loss of one 8x8 block of pixels and its gradient with respect to the velocity
// (flow_matching_loss.cpp has the formula; a whole block has no padding R):
//
//   d = velocity - target
//   sums      d^2 and W (F M d)^2 over the block
//   gradient  a d + f M' F' (W F M d)
#pragma once

#include "cpu/loss_transform.h"
#include "cpu/pixel_blocks.h"

namespace deco::cpu::DECO_CPU_ISA {

// Three channels of a block. A BlockRow of two 8x8 blocks also loads and stores the eight values after its row, which
// are never used: the rows are stored in order, and the values after the last row are padding.
struct BlockPlanes {
  alignas(64) float channel[3][kBlockPixels + kRowPixels - kBlock];

  float (*rows(int c)) [kBlock] { return reinterpret_cast<float (*)[kBlock]>(channel[c]); }
};

// Sum of the first eight lanes.
inline float sum_of_block(BlockRow x) {
  alignas(64) float lanes[kRowPixels];
  store_row(lanes, x);
  float sum = 0.0f;
  for (int i = 0; i < kBlock; ++i) sum += lanes[i];
  return sum;
}

class BlockLoss {
 public:
  explicit BlockLoss(const float* frequency_weight) { fill_weights(frequency_weight, 1.0f, weights_); }

  struct Sums {
    float pixel, frequency;
  };

  // The sums over a block; keeps d and F' W F M d for write_gradient, and the squared coefficients for add_squares.
  Sums add(const float (*velocity)[kBlockPixels], const float (*target)[kBlockPixels]) {
    return {subtract(velocity, target), transform()};
  }

  // gradient = a d + f M' F' (W F M d)
  void write_gradient(float a, float f, float (*gradient)[kBlockPixels]) const {
    for (int p = 0; p < kBlockPixels; p += kLanes) {
      VecF color[3];
      transposed_color(load(&ycbcr_.channel[0][p]), load(&ycbcr_.channel[1][p]), load(&ycbcr_.channel[2][p]), color);
      unroll<3>([&](auto c) DECO_INLINE_LAMBDA {
        store(&gradient[c][p], fma(broadcast(f), color[c], broadcast(a) * load(&difference_[c][p])));
      });
    }
  }

  // sums [3, 8, 8] += weight (F M d)^2
  void add_squares(double weight, double* sums) const {
    for (int c = 0; c < 3; ++c)
      for (int h = 0; h < kBlock; ++h)
        for (int v = 0; v < kBlock; ++v)
          sums[frequency_index(c, v, h)] += weight * squares_.value[c][h][v] * square_norm(c, v, h);
  }

 private:
  // d, and M d without kColorScale; returns the sum of d^2.
  float subtract(const float (*velocity)[kBlockPixels], const float (*target)[kBlockPixels]) {
    VecF squares = broadcast(0.0f);
    for (int p = 0; p < kBlockPixels; p += kLanes) {
      VecF d[3], ycbcr[3];
      unroll<3>([&](auto c) DECO_INLINE_LAMBDA {
        d[c] = load(&velocity[c][p]) - load(&target[c][p]);
        squares = fma(d[c], d[c], squares);
        store(&difference_[c][p], d[c]);
      });
      to_ycbcr(d[0], d[1], d[2], ycbcr);
      unroll<3>([&](auto c) DECO_INLINE_LAMBDA { store(&ycbcr_.channel[c][p], ycbcr[c]); });
    }
    return sum(squares);
  }

  // ycbcr <- F' W F ycbcr; returns the sum of W (F ycbcr)^2.
  float transform() {
    BlockRow energy = broadcast_row(0.0f);
    for (int c = 0; c < 3; ++c) {
      BlockRow block[kBlock];
      load_coefficients(ycbcr_.rows(c), 0, block);
      unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA {
        const BlockRow square = block[i] * block[i], weight = load_row(weights_.value[c][i]);
        store_row(squares_.value[c][i], square);
        energy = fma(weight, square, energy);
        block[i] = weight * block[i];
      });
      store_transposed(block, ycbcr_.rows(c), 0);
    }
    return sum_of_block(energy);
  }

  CoefficientTable weights_, squares_;
  alignas(64) float difference_[3][kBlockPixels];
  BlockPlanes ycbcr_ = {};
};

}  // namespace deco::cpu::DECO_CPU_ISA
