// Forward of upsample_modulate on one tile of T pixels, from SiLU(y) and h:
//
//   (shift, scale, gate) = W_mod SiLU(y) + b_mod
//   modulated = LayerNorm(h) (1 + scale) + shift
//
// Per pixel: 3 D^2 multiply-adds.
#pragma once

#include "cpu/decoder_tile.h"

namespace deco::cpu::DECO_CPU_ISA {

// Working memory of one thread.
template <class Operand, int D, int T>
struct alignas(64) ModulationTile {
  using Element = typename Operand::Element;
  float h[D][T], mean[T], rstd[T];
  Element silu_cond[D / Operand::kPack][T];
  Element modulated[D / Operand::kPack][T], gate[D / Operand::kPack][T];
};

// gate = W_gate SiLU(y) + b_gate, for the strip at `pixel`.
template <class Operand, int D, int T>
DECO_INLINE void gate_strip(const BlockWeights<Operand>& w, int pixel, ModulationTile<Operand, D, T>& tile) {
  constexpr int kGateRow = 2 * D;
  const auto gate = product<Operand, D, D, T>(w.mod + kGateRow * D / Operand::kPack, strip_of(tile.silu_cond, pixel));
  for (int first = 0; first < D; first += kGroup) {
    GroupSums sums;
    linear(sums, gate, w.mod_bias + kGateRow, first);
    unroll<kGroup>([&](auto i) DECO_INLINE_LAMBDA {
      constexpr int kOutput = i / 2 * 2, kVector = i % 2;
      Operand::put(tile.gate, first + kOutput, pixel + kVector * kLanes, sums[2 * kOutput + kVector],
                   sums[2 * kOutput + 2 + kVector]);
    });
  }
}

// tile.modulated and tile.gate from tile.silu_cond and tile.h.
template <class Operand, int D, int T>
void modulate_tile(const BlockWeights<Operand>& w, float eps, int pixels, ModulationTile<Operand, D, T>& tile) {
  layer_norm_statistics<D, T>(tile.h, eps, pixels, tile.mean, tile.rstd);
  for (int pixel = 0; pixel < pixels; pixel += kStrip) {
    modulate_strip<false, Operand, D, T>(w, tile.silu_cond, tile.h, pixel, tile);
    gate_strip(w, pixel, tile);
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
