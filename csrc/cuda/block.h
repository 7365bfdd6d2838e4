// Decoder block, embedding and the backward of the head on the pixels of one warp (DeCo, arXiv 2511.19365, section 3):
//
//   s = SiLU(cond);  shift, scale, gate = W_mod·s + b_mod;  m = LayerNorm(h)·(1 + scale) + shift
//   h' = h + gate·(W_2·SiLU(W_1·m + b_1) + b_2)
//
// h stays in registers in float32; s and the inputs of matmuls are rounded to the compute dtype. Per pixel and decoder
// block: 10·D² FLOPs on the tensor cores.
#pragma once

#include "cuda/packed_weights.h"

namespace deco::cuda {

// SiLU of the lane's two rows of cond as a left operand.
template <class T, int D>
DECO_DEVICE Operand<D> silu_operand(const RowWords<D>& upper, const RowWords<D>& lower) {
  Operand<D> s;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
    s.template set<T>(j, silu_of_double(half_of_low<T>(upper.word[j])), silu_of_double(half_of_high<T>(upper.word[j])),
                      silu_of_double(half_of_low<T>(lower.word[j])), silu_of_double(half_of_high<T>(lower.word[j])));
  return s;
}

template <int D>
DECO_DEVICE Operand<D> operand_of(const RowWords<D>& upper, const RowWords<D>& lower) {
  Operand<D> operand;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    operand.k_step[j / 2][2 * (j % 2)] = upper.word[j];
    operand.k_step[j / 2][2 * (j % 2) + 1] = lower.word[j];
  }
  return operand;
}

// Row `which` (0: upper, 1: lower) of the lane's two rows of a left operand.
template <int D>
DECO_DEVICE RowWords<D> row_of(const Operand<D>& operand, int which) {
  RowWords<D> row;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) row.word[j] = operand.k_step[j / 2][2 * (j % 2) + which];
  return row;
}

template <class T, int D>
DECO_DEVICE Tile<D> tile_of(const RowWords<D>& upper, const RowWords<D>& lower) {
  Tile<D> tile;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    tile.v[j][0] = low<T>(upper.word[j]);
    tile.v[j][1] = high<T>(upper.word[j]);
    tile.v[j][2] = low<T>(lower.word[j]);
    tile.v[j][3] = high<T>(lower.word[j]);
  }
  return tile;
}

template <class T, int D>
DECO_DEVICE Tile<D> tile_of(const Operand<D>& operand) {
  return tile_of<T>(row_of(operand, 0), row_of(operand, 1));
}

// Row `which` (0: upper, 1: lower) of the lane's two rows, rounded to the compute dtype.
template <class T, int D>
DECO_DEVICE RowWords<D> row_of(const Tile<D>& tile, int which) {
  RowWords<D> row;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) row.word[j] = pack<T>(tile.v[j][2 * which], tile.v[j][2 * which + 1]);
  return row;
}

// Replaces h by h', for the M tiles of a warp, which share the loads of weights.
template <class T, int D, int M>
DECO_DEVICE void block_forward(Tile<D> (&h)[M], const Operand<D> (&s)[M], const BlockWeights<T, D>& w, float eps) {
  RowStatistics stats[M];
#pragma unroll
  for (int m = 0; m < M; ++m) stats[m] = statistics(h[m], eps);
  Operand<D> modulated[M], activated[M];
  const Linear<T, D> to_shift = w.linear(kShift), to_scale = w.linear(kScale);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    float shift[M][4], scale[M][4];
    to_shift.apply(shift, s, j);
    to_scale.apply(scale, s, j);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float normalized = (h[m].v[j][i] - stats[m].mean.of(i)) * stats[m].rstd.of(i);
        v[i] = fmaf(normalized, scale[m][i], shift[m][i]);
      }
      modulated[m].template set<T>(j, v);
    }
  }
  const Linear<T, D> fc1 = w.linear(kFc1);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    float z[M][4];
    fc1.apply(z, modulated, j);
#pragma unroll
    for (int m = 0; m < M; ++m)
      activated[m].template set<T>(j, silu_of_double(z[m][0]), silu_of_double(z[m][1]), silu_of_double(z[m][2]),
                                   silu_of_double(z[m][3]));
  }
  const Linear<T, D> to_gate = w.linear(kGate), fc2 = w.linear(kFc2);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    float gate[M][4], u[M][4];
    to_gate.apply(gate, s, j);
    fc2.apply(u, activated, j);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) h[m].v[j][i] = fmaf(gate[m][i], u[m][i], h[m].v[j][i]);
  }
}

// h = W_x·x + table[k] for 16 pixels. x: left operand of channel_words; table: tile of the packed pixel table.
template <class T, int D>
DECO_DEVICE void embed(Tile<D>& h, const uint32_t (&x)[2], const T* pixel_weight, const float* table) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    const Float4 v = load(reinterpret_cast<const Float4*>(table) + 32 * j + lane());
    h.v[j][0] = v.x;
    h.v[j][1] = v.y;
    h.v[j][2] = v.z;
    h.v[j][3] = v.w;
  }
#pragma unroll
  for (int i = 0; i < D; i += 32) {
    uint32_t w[4];  // four column tiles; at D = 16 two, repeated
    load_matrices(w, pixel_weight + ((i + lane()) & (D - 1)) * kChannelSlots);
#pragma unroll
    for (int j = 0; j < 4 && 8 * j < D; ++j) multiply<T>(h.v[i / 8 + j], x, w[j], h.v[i / 8 + j]);
  }
}

// h += query, whose lane's two rows these are.
template <class T, int D>
DECO_DEVICE void add_query(Tile<D>& h, const RowWords<D>& upper, const RowWords<D>& lower) {
  const Tile<D> query = tile_of<T>(upper, lower);
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) h.v[j][i] += query.v[j][i];
}

// Gradient of the input of the head's norm, LayerNorm if centered; x is the gradient of the velocity as a left operand.
template <class T, int D>
DECO_DEVICE Tile<D> head_backward(const uint32_t (&x)[2], const Tile<D>& normalized, RowPair rstd, const T* head,
                                  bool centered) {
  Tile<D> grad, result = zeros<D>();
#pragma unroll
  for (int i = 0; i < D; i += 32) {
    uint32_t w[4];  // four column tiles; at D = 16 two, repeated
    load_matrices_transposed(w, head + (lane() & 7) * kRowStride<D> + ((i + (lane() & ~7)) & (D - 1)));
#pragma unroll
    for (int j = 0; j < 4 && 8 * j < D; ++j) {
      const float zero[4] = {0, 0, 0, 0};
      multiply<T>(grad.v[i / 8 + j], x, w[j], zero);
    }
  }
  add_normalize_gradient(result, grad, normalized, rstd, centered);
  return result;
}

}  // namespace deco::cuda
