// Decoder forward on one tile of T pixels (DeCo, arXiv 2511.19365, section 3):
//
//   h = pixel_weight rgb + panel                                             query
//   for each decoder block:                                                  forward_block
//     (shift, scale, gate) = W_mod SiLU(y) + b_mod
//     m = LayerNorm(h) (1 + scale) + shift
//     h += gate (W_2 SiLU(W_1 m + b_1) + b_2)
//   velocity = W_head norm(h) + b_head, norm: LayerNorm or RMSNorm           head
//
// A panel holds what the query adds per pixel: pixel_table, and the rows of the caller's query if there are any.
// `pixels` is the number of pixels to compute, a multiple of kStrip up to T. A tile is channel-major, [D][T]; its
// working set stays in the L1 and L2 caches (about 40 KB at D = 32, T = 64 in float). Per pixel and decoder block:
// 5 D^2 multiply-adds and D SiLUs.
#pragma once

#include "cpu/decoder_weights.h"
#include "cpu/pixels.h"
#include "cpu/rows.h"

namespace deco::cpu::DECO_CPU_ISA {

// Intermediate results of one decoder block's forward.
template <class Operand, int D, int T>
struct alignas(64) BlockTile {
  using Element = typename Operand::Element;
  float mean[T], rstd[T];
  Element modulated[D / Operand::kPack][T];  // m
  Element hidden[D / Operand::kPack][T];     // SiLU(W_1 m + b_1)
  float gate[D][T];
};

// BlockTile plus the intermediate results that the backward reads.
template <class Operand, int D, int T>
struct alignas(64) SavedBlockTile : BlockTile<Operand, D, T> {
  float normalized[D][T];         // (h - mean) rstd
  float scale[D][T];              // 1 + scale
  float hidden_derivative[D][T];  // SiLU' at W_1 m + b_1
  float update[D][T];             // W_2 hidden + b_2
};

// Stores SiLU(y) of channels `channel` (even) and channel + 1 as an operand of the modulation matmul and, if
// `derivative` is not null, SiLU'(y).
template <class Operand, int T>
DECO_INLINE void put_silu(VecF y0, VecF y1, int channel, int pixel, typename Operand::Element (*silu_cond)[T],
                          float (*derivative)[T]) {
  const VecF s0 = sigmoid<Operand::kAccuracy>(y0), s1 = sigmoid<Operand::kAccuracy>(y1);
  const VecF a0 = y0 * s0, a1 = y1 * s1;
  Operand::put(silu_cond, channel, pixel, a0, a1);
  if (derivative != nullptr) {
    store(&derivative[channel][pixel], silu_derivative(a0, s0));
    store(&derivative[channel + 1][pixel], silu_derivative(a1, s1));
  }
}

// SiLU(cond) in the layout of put_silu; rows[i] is the address of the D values of row i.
template <class Operand, int D, int T>
void load_silu_cond(DType dtype, const char* const (&rows)[T], int pixels, typename Operand::Element (*silu_cond)[T],
                    float (*derivative)[T] = nullptr) {
#if DECO_HAVE_BF16_DOT
  if constexpr (D % (2 * kLanes) == 0)
    if (dtype == DType::kBFloat16) {
      for (int pixel = 0; pixel < pixels; pixel += kLanes)
        for (int d = 0; d < D; d += 2 * kLanes) {
          VecPair y[kLanes];
          load_bf16_square(rows, pixel, d, y);
          unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
            put_silu<Operand, T>(first_of_pairs(y[i]), second_of_pairs(y[i]), d + 2 * i, pixel, silu_cond, derivative);
          });
        }
      return;
    }
#endif
  with_dtype(dtype, [&](auto storage) {
    for (int pixel = 0; pixel < pixels; pixel += kLanes)
      for (int d = 0; d < D; d += kLanes) {
        VecF y[kLanes];
        unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { y[i] = load_as<storage.value>(rows[pixel + i], d); });
        transpose(y);
        unroll<kLanes / 2>([&](auto i) DECO_INLINE_LAMBDA {
          put_silu<Operand, T>(y[2 * i], y[2 * i + 1], d + 2 * i, pixel, silu_cond, derivative);
        });
      }
  });
}

// Calls body(integral_constant<int, C>).
template <class Body>
DECO_INLINE void with_channels(int channels, Body&& body) {
  switch (channels) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
  }
}

// panel += rows; rows[i] is the address of the D values of row i.
template <int D, int T>
void add_rows(DType dtype, const char* const (&rows)[T], int pixels, float (*panel)[T]) {
  alignas(64) float tile[D][T];
  load_rows<D, T>(dtype, rows, pixels, tile);
  for (int d = 0; d < D; ++d)
    for (int pixel = 0; pixel < pixels; pixel += kLanes) accumulate(&panel[d][pixel], load(&tile[d][pixel]));
}

// The panel `table` of a tile, plus the tile's rows of the query in `panel` if there is a query.
template <int D, int T, class Addresses>
const float (*with_query(const PixelRows& query, const float (*table)[T], int pixels, Addresses&& addresses,
                         float (*panel)[T])) [T] {
  if (query.data == nullptr) return table;
  const char* rows[T];
  addresses(query, rows);
  std::memcpy(panel, table, sizeof(float) * D * T);
  add_rows<D, T>(query.dtype, rows, pixels, panel);
  return panel;
}

// h = pixel_weight rgb + panel, with pixel_weight [D][C] and panel [D][T].
template <int D, int T>
void query(int channels, const float* pixel_weight, const float (*panel)[T], const float (*rgb)[T], int pixels,
           float (*h)[T]) {
  with_channels(channels, [&](auto count) {
    constexpr int C = count;
    for (int pixel = 0; pixel < pixels; pixel += kLanes) {
      VecF x[C];
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { x[c] = load(&rgb[c][pixel]); });
      for (int d = 0; d < D; ++d) {
        VecF sum = load(&panel[d][pixel]);
        unroll<C>([&](auto c) DECO_INLINE_LAMBDA { sum = fma(broadcast(pixel_weight[d * C + c]), x[c], sum); });
        store(&h[d][pixel], sum);
      }
    }
  });
}

// value(first) + ... + value(first + N - 1), as a balanced tree: the sum of N equal values is exact.
template <int N, class Value>
DECO_INLINE VecF pairwise_sum(Value&& value, int first = 0) {
  if constexpr (N == 1)
    return value(first);
  else
    return pairwise_sum<N / 2>(value, first) + pairwise_sum<N / 2>(value, first + N / 2);
}

// mean and rstd = 1 / sqrt(variance + eps) over the channels of each pixel; rstd is NaN if the variance is not finite.
// rstd multiplies the error of the mean, by up to 1,000 at eps = 1e-6; the pairwise sum limits that error to a few
// roundings.
template <int D, int T>
void layer_norm_statistics(const float (*h)[T], float eps, int pixels, float* mean, float* rstd) {
  for (int pixel = 0; pixel < pixels; pixel += kStrip)
    unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
      const int p = pixel + v * kLanes;
      const auto channel = [&](int d) DECO_INLINE_LAMBDA { return load(&h[d][p]); };
      const VecF average = pairwise_sum<D>(channel) * broadcast(1.0f / D);
      VecF even = broadcast(0.0f), odd = broadcast(0.0f);
      for (int d = 0; d < D; d += 2) {
        const VecF a = channel(d) - average, b = channel(d + 1) - average;
        even = fma(a, a, even);
        odd = fma(b, b, odd);
      }
      const VecF variance = (even + odd) * broadcast(1.0f / D), nan_if_infinite = variance * broadcast(0.0f);
      store(mean + p, average);
      store(rstd + p, rsqrt(variance + broadcast(eps)) + nan_if_infinite);
    });
}

// mean = 0 and rstd = 1 / sqrt(mean(h^2) + eps): with them the formulas of LayerNorm give RMSNorm. rstd is NaN if the
// mean square is not finite.
template <int D, int T>
void rms_norm_statistics(const float (*h)[T], float eps, int pixels, float* mean, float* rstd) {
  for (int pixel = 0; pixel < pixels; pixel += kLanes) {
    VecF even = broadcast(0.0f), odd = broadcast(0.0f);
    for (int d = 0; d < D; d += 2) {
      const VecF a = load(&h[d][pixel]), b = load(&h[d + 1][pixel]);
      even = fma(a, a, even);
      odd = fma(b, b, odd);
    }
    const VecF square = (even + odd) * broadcast(1.0f / D), nan_if_infinite = square * broadcast(0.0f);
    store(mean + pixel, broadcast(0.0f));
    store(rstd + pixel, rsqrt(square + broadcast(eps)) + nan_if_infinite);
  }
}

// Statistics of the head's norm.
template <int D, int T>
void head_statistics(bool rms_norm, const float (*h)[T], float eps, int pixels, float* mean, float* rstd) {
  if (rms_norm) return rms_norm_statistics<D, T>(h, eps, pixels, mean, rstd);
  layer_norm_statistics<D, T>(h, eps, pixels, mean, rstd);
}

// modulated = LayerNorm(h) (1 + scale) + shift, for the strip at `pixel`. Each group of sums is half shift, half scale.
template <bool kKeep, class Operand, int D, int T, class Tile>
DECO_INLINE void modulate_strip(const BlockWeights<Operand>& w, const typename Operand::Element (*silu_cond)[T],
                                const float (*h)[T], int pixel, Tile& tile) {
  constexpr int kHalf = kGroup / 2;
  const auto shift_and_scale = product<Operand, 2 * D, D, T>(w.mod, strip_of(silu_cond, pixel));
  for (int first = 0; first < D; first += kHalf) {
    GroupSums sums;
    set_sums(sums, w.mod_bias + first, w.mod_bias + D + first);
    shift_and_scale.add_to(sums, first, D + first);
    unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
      const int p = pixel + v * kLanes;
      const VecF mean = load(tile.mean + p), rstd = load(tile.rstd + p);
      VecF modulated[kHalf];
      unroll<kHalf>([&](auto i) DECO_INLINE_LAMBDA {
        const int d = first + i;
        const VecF shift = sums[2 * i + v], scale = sums[2 * (kHalf + i) + v];
        const VecF normalized = (load(&h[d][p]) - mean) * rstd;
        modulated[i] = fma(fma(normalized, broadcast(w.norm_weight[d]), broadcast(w.norm_bias[d])), scale, shift);
        if constexpr (kKeep) {
          store(&tile.normalized[d][p], normalized);
          store(&tile.scale[d][p], scale);
        }
      });
      unroll<kHalf / 2>([&](auto i) DECO_INLINE_LAMBDA {
        Operand::put(tile.modulated, first + 2 * i, p, modulated[2 * i], modulated[2 * i + 1]);
      });
    });
  }
}

// hidden = SiLU(W_1 modulated + b_1), for the strip at `pixel`.
template <bool kKeep, class Operand, int D, int T, class Tile>
DECO_INLINE void hidden_strip(const BlockWeights<Operand>& w, int pixel, Tile& tile) {
  const auto z = product<Operand, D, D, T>(w.fc1, strip_of(tile.modulated, pixel));
  for (int first = 0; first < D; first += kGroup) {
    GroupSums sums;
    linear(sums, z, w.fc1_bias, first);
    unroll<kGroup / 2>([&](auto i) DECO_INLINE_LAMBDA {
      unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
        const int d = first + 2 * i, p = pixel + v * kLanes;
        const VecF z0 = sums[4 * i + v], z1 = sums[4 * i + 2 + v];
        const VecF s0 = sigmoid<Operand::kAccuracy>(z0), s1 = sigmoid<Operand::kAccuracy>(z1);
        const VecF a0 = z0 * s0, a1 = z1 * s1;
        Operand::put(tile.hidden, d, p, a0, a1);
        if constexpr (kKeep) {
          store(&tile.hidden_derivative[d][p], silu_derivative(a0, s0));
          store(&tile.hidden_derivative[d + 1][p], silu_derivative(a1, s1));
        }
      });
    });
  }
}

// h += gate (W_2 hidden + b_2), for the strip at `pixel`.
template <bool kKeep, class Operand, int D, int T, class Tile>
DECO_INLINE void residual_strip(const BlockWeights<Operand>& w, const typename Operand::Element (*silu_cond)[T],
                                float (*h)[T], int pixel, Tile& tile) {
  constexpr int kElements = D / Operand::kPack;
  const auto gate = product<Operand, D, D, T>(w.mod + 2 * D * kElements, strip_of(silu_cond, pixel));
  const auto update = product<Operand, D, D, T>(w.fc2, strip_of(tile.hidden, pixel));
  for (int first = 0; first < D; first += kGroup) {
    GroupSums sums;
    linear(sums, gate, w.mod_bias + 2 * D, first);
    unroll<2 * kGroup>([&](auto i)
                           DECO_INLINE_LAMBDA { store(&tile.gate[first + i / 2][pixel + i % 2 * kLanes], sums[i]); });
    linear(sums, update, w.fc2_bias, first);
    unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA {
      const int d = first + i / 2, p = pixel + i % 2 * kLanes;
      if constexpr (kKeep) store(&tile.update[d][p], sums[i]);
      store(&h[d][p], fma(sums[i], load(&tile.gate[d][p]), load(&h[d][p])));
    });
  }
}

// One decoder block; with a SavedBlockTile it also stores the inputs of the backward.
template <class Operand, int D, int T, class Tile>
void forward_block(const BlockWeights<Operand>& w, float eps, const typename Operand::Element (*silu_cond)[T],
                   int pixels, float (*h)[T], Tile& tile) {
  constexpr bool kKeep = std::is_same_v<Tile, SavedBlockTile<Operand, D, T>>;
  layer_norm_statistics<D, T>(h, eps, pixels, tile.mean, tile.rstd);
  for (int pixel = 0; pixel < pixels; pixel += kStrip)
    modulate_strip<kKeep, Operand, D, T>(w, silu_cond, h, pixel, tile);
  for (int pixel = 0; pixel < pixels; pixel += kStrip) hidden_strip<kKeep, Operand, D, T>(w, pixel, tile);
  for (int pixel = 0; pixel < pixels; pixel += kStrip)
    residual_strip<kKeep, Operand, D, T>(w, silu_cond, h, pixel, tile);
}

// velocity = W_head normalized + b_head, with W_head [C][D]; normalized(d, p) is channel d of the vector at pixel p.
template <int D, int T, class Normalized>
DECO_INLINE void head_matmul(int channels, const float* weight, const float* bias, int pixels, Normalized&& normalized,
                             float (*velocity)[T]) {
  with_channels(channels, [&](auto count) {
    constexpr int C = count;
    for (int pixel = 0; pixel < pixels; pixel += kStrip) {
      VecF sums[2 * C];
      unroll<C>([&](auto c) DECO_INLINE_LAMBDA { sums[2 * c] = sums[2 * c + 1] = broadcast(bias[c]); });
      for (int d = 0; d < D; ++d)
        unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
          const VecF x = normalized(d, pixel + v * kLanes);
          unroll<C>([&](auto c) DECO_INLINE_LAMBDA {
            sums[2 * c + v] = fma(broadcast(weight[c * D + d]), x, sums[2 * c + v]);
          });
        });
      unroll<2 * C>([&](auto i) DECO_INLINE_LAMBDA { store(&velocity[i / 2][pixel + i % 2 * kLanes], sums[i]); });
    }
  });
}

// velocity = W_head norm(h) + b_head
template <class Operand, int D, int T>
void head(const DecoderWeights<Operand, T>& weights, const float (*h)[T], int pixels, float* mean, float* rstd,
          float (*velocity)[T]) {
  head_statistics<D, T>(weights.rms_norm, h, weights.eps, pixels, mean, rstd);
  const auto normalized = [&](int d, int p)
                              DECO_INLINE_LAMBDA { return (load(&h[d][p]) - load(mean + p)) * load(rstd + p); };
  head_matmul<D, T>(weights.channels, weights.head_weight, weights.head_bias, pixels, normalized, velocity);
}

// Working memory of one thread in the forward.
template <class Operand, int D, int T>
struct alignas(64) DecoderTile {
  float h[D][T];
  typename Operand::Element silu_cond[D / Operand::kPack][T];
  BlockTile<Operand, D, T> block;
  float rgb[kMaxChannels][T], velocity[kMaxChannels][T];
  float panel[D][T];  // with a query
};

// Computes tile.velocity from tile.silu_cond, tile.rgb and the panel of the tile's pixels.
template <class Operand, int D, int T>
void forward_tile(const DecoderWeights<Operand, T>& weights, const float (*panel)[T], int pixels,
                  DecoderTile<Operand, D, T>& tile) {
  query<D, T>(weights.channels, weights.pixel_weight, panel, tile.rgb, pixels, tile.h);
  for (int n = 0; n < weights.depth; ++n)
    forward_block<Operand, D, T>(weights.blocks[n], weights.eps, tile.silu_cond, pixels, tile.h, tile.block);
  head<Operand, D, T>(weights, tile.h, pixels, tile.block.mean, tile.block.rstd, tile.velocity);
}

// Calls body(Operand{}, integral_constant<int, D>): PairOperand for bfloat16 with DECO_HAVE_BF16_DOT, otherwise
// FloatOperand.
template <class Body>
DECO_INLINE void with_operand_and_width(DType activation, int width, Body&& body) {
  const auto with_operand = [&](auto operand) {
    switch (width) {
      case 16: return body(operand, std::integral_constant<int, 16>{});
      case 32: return body(operand, std::integral_constant<int, 32>{});
      case 64: return body(operand, std::integral_constant<int, 64>{});
    }
  };
#if DECO_HAVE_BF16_DOT
  if (activation == DType::kBFloat16) return with_operand(PairOperand{});
#endif
  (void)activation;
  with_operand(FloatOperand{});
}

}  // namespace deco::cpu::DECO_CPU_ISA
