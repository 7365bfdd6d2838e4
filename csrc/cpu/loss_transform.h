// Flow-matching loss, part 2: the weighted 8x8 DCT of the tiles' YCbCr planes. kColorScale and the normalization of the
// transform are folded into the weights.
#pragma once

#include "cpu/loss_tiles.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kFrequencies = kBlock * kBlock;

// Factor from the square of a coefficient of load_coefficients to the square of the coefficient of F M.
inline float square_norm(int channel, int vertical, int horizontal) {
  return dct_square_norm(vertical) * dct_square_norm(horizontal) * kColorScale[channel] * kColorScale[channel];
}

// One value per coefficient in the register layout of transformed 8x8 blocks: row = horizontal frequency, lane =
// vertical frequency, repeated for each 8x8 block of a BlockRow.
struct CoefficientTable {
  alignas(64) float value[3][kBlock][kRowPixels];
};

// Calls body(value, channel, vertical frequency, horizontal frequency) for every entry of the table.
template <class Table, class Body>
DECO_INLINE void for_each_coefficient(Table& table, Body&& body) {
  for (int c = 0; c < 3; ++c)
    for (int h = 0; h < kBlock; ++h)
      for (int lane = 0; lane < kRowPixels; ++lane) body(table.value[c][h][lane], c, lane % kBlock, h);
}

DECO_INLINE int frequency_index(int channel, int vertical, int horizontal) {
  return (channel * kBlock + vertical) * kBlock + horizontal;
}

// weights = factor * W, with kColorScale and the normalization of the transform folded in
inline void fill_weights(const float* frequency_weight, float factor, CoefficientTable& weights) {
  for_each_coefficient(weights, [&](float& value, int c, int v, int h) {
    value = factor * (frequency_weight[frequency_index(c, v, h)] * square_norm(c, v, h));
  });
}

// F: coefficients of the 8x8 blocks at column x; row = horizontal frequency, lane = vertical frequency.
template <int kPitch>
DECO_INLINE void load_coefficients(const float (*plane)[kPitch], int x, BlockRow (&block)[kBlock]) {
  unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA { block[i] = load_row(plane[i] + x); });
  dct(block);
  transpose_blocks(block);
  dct(block);
}

// F'
template <int kPitch>
DECO_INLINE void store_transposed(BlockRow (&block)[kBlock], float (*plane)[kPitch], int x) {
  dct_transposed(block);
  transpose_blocks(block);
  dct_transposed(block);
  unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA { store_row(plane[i] + x, block[i]); });
}

// Calls body(channel, x) for every BlockRow of the tile, and prefetch(step, steps) before each of these `steps` steps.
template <class Prefetch, class Body>
DECO_INLINE void for_each_block(const Tile& tile, Prefetch&& prefetch, Body&& body) {
  const int steps = 3 * tile.vector_columns() / kRowPixels;
  int step = 0;
  for (int c = 0; c < 3; ++c)
    for (int x = 0; x < tile.vector_columns(); x += kRowPixels) {
      prefetch(step++, steps);
      body(c, x);
    }
}

struct NoPrefetch {
  DECO_INLINE void operator()(int, int) const {}
};

// sum of weights * (F ycbcr)^2; calls prefetch as for_each_block does
template <class Prefetch>
float weighted_energy(const CoefficientTable& weights, const Tile& tile, const Planes& ycbcr, Prefetch&& prefetch) {
  BlockRow energy = broadcast_row(0.0f);
  const auto add_block = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>(
        [&](auto i) DECO_INLINE_LAMBDA { energy = fma(block[i] * load_row(weights.value[c][i]), block[i], energy); });
  };
  for_each_block(tile, prefetch, add_block);
  return sum(energy);
}

// ycbcr <- F' weights F ycbcr; calls prefetch as for_each_block does
template <class Prefetch>
void apply_weights(const CoefficientTable& weights, const Tile& tile, Planes& ycbcr, Prefetch&& prefetch) {
  const auto apply = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA { block[i] = block[i] * load_row(weights.value[c][i]); });
    store_transposed(block, ycbcr.channel[c], x);
  };
  for_each_block(tile, prefetch, apply);
}

// The two above in one pass: ycbcr <- F' gradient_weights F ycbcr; returns the sum of weights * (F ycbcr)^2.
template <class Prefetch>
float weighted_energy_and_apply(const CoefficientTable& weights, const CoefficientTable& gradient_weights,
                                const Tile& tile, Planes& ycbcr, Prefetch&& prefetch) {
  BlockRow energy = broadcast_row(0.0f);
  const auto apply = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA {
      energy = fma(block[i] * load_row(weights.value[c][i]), block[i], energy);
      block[i] = block[i] * load_row(gradient_weights.value[c][i]);
    });
    store_transposed(block, ycbcr.channel[c], x);
  };
  for_each_block(tile, prefetch, apply);
  return sum(energy);
}

// sums [3, 8, 8] <- (F M d)^2, summed over the 8x8 blocks of the tile
inline void sum_squares(const Tile& tile, const Planes& ycbcr, double* sums) {
  CoefficientTable squares = {};
  const auto add_block = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA {
      store_row(squares.value[c][i], fma(block[i], block[i], load_row(squares.value[c][i])));
    });
  };
  for_each_block(tile, NoPrefetch{}, add_block);
  for (int k = 0; k < 3 * kFrequencies; ++k) sums[k] = 0.0;
  for_each_coefficient(squares, [&](float square, int c, int v, int h) {
    sums[frequency_index(c, v, h)] += double{square} * square_norm(c, v, h);
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
