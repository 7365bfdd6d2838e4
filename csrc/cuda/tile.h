// A warp's tile of 16 pixels x D channels in registers, its matmuls with D x D matrices in shared memory, and
// LayerNorm.
//
// Layout of the tensor core fragments, with g = lane / 4 and t = lane % 4. A word holds two elements, the lower column
// in its low half.
//
//   register of a lane         row (pixel)   columns
//   Tile::v[j][0], [1]         g             8j + 2t, 8j + 2t + 1
//   Tile::v[j][2], [3]         g + 8         8j + 2t, 8j + 2t + 1
//   Operand::k_step[k][0]      g             16k + 2t, 16k + 2t + 1
//   Operand::k_step[k][1]      g + 8         16k + 2t, 16k + 2t + 1
//   Operand::k_step[k][2]      g             16k + 8 + 2t, 16k + 8 + 2t + 1
//   Operand::k_step[k][3]      g + 8         16k + 8 + 2t, 16k + 8 + 2t + 1
//
//                              output        inputs
//   Weights8::k_step[k][0]     g             16k + 2t, 16k + 2t + 1
//   Weights8::k_step[k][1]     g             16k + 8 + 2t, 16k + 8 + 2t + 1
//
// Column tiles 2k and 2k + 1 of a Tile, rounded to the compute dtype, are k-step k of the left operand of the next
// matmul, so activations stay in registers. Columns are permuted channels: each lane owns D / 4 consecutive channels of
// a pixel, and rows move in 16-byte accesses. Packed weights have the same permutation.
#pragma once

#include "cuda/primitives.h"

namespace deco::cuda {

// Pixels of a tile: rows of one tensor core instruction.
constexpr int kTilePixels = 16;

// Column 8j + 2t + e holds channel (D / 4)·t + 2j + e of D channels. The two functions are inverses.
DECO_DEVICE int channel_of_column(int column, int D) {
  return (D / 4) * ((column >> 1) & 3) + 2 * (column >> 3) + (column & 1);
}
DECO_DEVICE int column_of_channel(int channel, int D) {
  const int t = channel / (D / 4), within = channel % (D / 4);
  return 8 * (within / 2) + 2 * t + within % 2;
}

// Rows of packed matrices: D weights, then the bias in kBiasSlots numbers (three that sum to it, then zeros). A row is
// an odd multiple of 16 bytes, which avoids bank conflicts of matrix loads from shared memory.
constexpr int kBiasSlots = 8, kBiasParts = 3;
template <int D>
constexpr int kRowStride = D + kBiasSlots;

template <int D>
struct Tile {
  float v[D / 8][4];
};

template <int D>
DECO_DEVICE Tile<D> zeros() {
  Tile<D> tile;
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) tile.v[j][i] = 0.0f;
  return tile;
}

// A tile rounded to the compute dtype: left operand of a matmul over all D columns.
template <int D>
struct Operand {
  uint32_t k_step[D / 16][4];

  template <class T>
  DECO_DEVICE void set(int j, float v0, float v1, float v2, float v3) {
    k_step[j / 2][2 * (j % 2)] = pack<T>(v0, v1);
    k_step[j / 2][2 * (j % 2) + 1] = pack<T>(v2, v3);
  }
  template <class T>
  DECO_DEVICE void set(int j, const float (&v)[4]) {
    set<T>(j, v[0], v[1], v[2], v[3]);
  }
  // Zeros row `which` (0: upper, 1: lower) of the lane's two rows.
  DECO_DEVICE void clear_row(int which) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) k_step[k][which] = k_step[k][2 + which] = 0u;
  }
};

template <class T, int D>
DECO_DEVICE Operand<D> rounded(const Tile<D>& tile) {
  Operand<D> operand;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) operand.template set<T>(j, tile.v[j]);
  return operand;
}

// ---- matmuls ------------------------------------------------------------------------------------------------------

// Right operand of a matmul with D inputs and 8 outputs.
template <int D>
struct Weights8 {
  uint32_t k_step[D / 16][2];
};

// Addresses of a lane in a matrix W [out][in] in shared memory that starts at `matrix`: for `weight_rows`, and for the
// biases after the rows.
template <class T, int D>
DECO_DEVICE const T* lane_weights(const T* matrix) {
  return matrix + (lane() & 7) * kRowStride<D> + ((lane() >> 3) & (D / 8 - 1)) * 8;
}
template <class T, int D, int Outputs = D>
DECO_DEVICE const T* lane_biases(const T* matrix) {
  return matrix + (lane() & (Outputs - 1)) * kRowStride<D> + D;
}

// The eight outputs of W whose rows start at the place of `lane_weights`, for x·Wᵀ.
template <class T, int D>
DECO_DEVICE Weights8<D> weight_rows(const T* rows) {
  Weights8<D> w;
  uint32_t words[4];
  if constexpr (D == 16) {
    load_matrices(words, rows);
    w.k_step[0][0] = words[0];
    w.k_step[0][1] = words[1];
  } else {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      load_matrices(words, rows + 32 * k);
      w.k_step[2 * k][0] = words[0];
      w.k_step[2 * k][1] = words[1];
      w.k_step[2 * k + 1][0] = words[2];
      w.k_step[2 * k + 1][1] = words[3];
    }
  }
  return w;
}

// The eight inputs of W [out][in] in shared memory whose columns start at `columns`, for x·W.
template <class T, int D>
DECO_DEVICE Weights8<D> weight_columns(const T* columns, int stride = kRowStride<D>) {
  Weights8<D> w;
  uint32_t words[4];
  if constexpr (D == 16) {
    load_matrices_transposed(words, columns + (lane() & 15) * stride);
    w.k_step[0][0] = words[0];
    w.k_step[0][1] = words[1];
  } else {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      load_matrices_transposed(words, columns + (lane() + 32 * k) * stride);
      w.k_step[2 * k][0] = words[0];
      w.k_step[2 * k][1] = words[1];
      w.k_step[2 * k + 1][0] = words[2];
      w.k_step[2 * k + 1][1] = words[3];
    }
  }
  return w;
}

// total += x·w
template <class T, int D>
DECO_DEVICE void multiply_add(float (&total)[4], const Operand<D>& x, const Weights8<D>& w) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) multiply<T>(total, x.k_step[k], w.k_step[k], total);
}

// Left operand (16 rows x 8) with ones in the columns of the bias parts.
struct BiasSelector {
  uint32_t words[2];
};
template <class T>
DECO_DEVICE BiasSelector bias_selector() {
  const int t = lane() & 3;
  const uint32_t word = t == 0 ? T::kOne * 0x10001u : t == 1 ? T::kOne : 0u;
  return {word, word};
}
// The same from two lanes with the same t: the compiler keeps two registers, where it would copy one before every
// multiplication.
template <class T>
DECO_DEVICE BiasSelector bias_selector_in_two_registers() {
  const BiasSelector selector = bias_selector<T>();
  return {shuffle_xor(selector.words[0], 4), shuffle_xor(selector.words[1], 8)};
}

// Linear layer with D inputs and Outputs outputs; the packed matrix is in shared memory. The bias is one more step of
// the matmul, shared by M tiles, which is cheaper than moving biases into the accumulators.
template <class T, int D, int Outputs = D>
struct Linear {
  const T* weights;  // lane_weights
  BiasSelector selector;
  uint32_t bias[Outputs / 8];

  DECO_DEVICE Linear(const T* weights, const T* biases, const BiasSelector& selector)
      : weights(weights), selector(selector) {
#pragma unroll
    for (int i = 0; i < Outputs; i += 32) {
      uint32_t words[4];
      load_matrices(words, biases + i * kRowStride<D>);
#pragma unroll
      for (int j = 0; j < 4 && i + 8 * j < Outputs; ++j) bias[i / 8 + j] = words[j];
    }
  }

  // Outputs 8j to 8j + 7 for M tiles. Several tiles share the product of the bias. For one, it comes last: nothing before
  // it depends on x, so the compiler would compute it early for all j, and registers would not suffice.
  template <int M>
  DECO_DEVICE void apply(float (&out)[M][4], const Operand<D> (&x)[M], int j) const {
    const Weights8<D> w = weight_rows<T, D>(weights + 8 * j * kRowStride<D>);
    const float zero[4] = {0, 0, 0, 0};
    if constexpr (M == 1) {
      multiply<T>(out[0], x[0].k_step[0], w.k_step[0], zero);
#pragma unroll
      for (int k = 1; k < D / 16; ++k) multiply<T>(out[0], x[0].k_step[k], w.k_step[k], out[0]);
      multiply<T>(out[0], selector.words, bias[j], out[0]);
      return;
    }
    float b[4];
    multiply<T>(b, selector.words, bias[j], zero);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply<T>(out[m], x[m].k_step[0], w.k_step[0], b);
#pragma unroll
      for (int k = 1; k < D / 16; ++k) multiply<T>(out[m], x[m].k_step[k], w.k_step[k], out[m]);
    }
  }
  DECO_DEVICE void apply(float (&out)[4], const Operand<D>& x, int j) const {
    float outputs[1][4];
    const Operand<D> inputs[1] = {x};
    apply(outputs, inputs, j);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = outputs[0][i];
  }
};

// ---- rows ---------------------------------------------------------------------------------------------------------

// One value for each of a lane's two rows.
struct RowPair {
  float upper, lower;

  // Value for the row of element i of Tile::v[j].
  DECO_DEVICE float of(int i) const { return i < 2 ? upper : lower; }
};

// Sum over the four lanes that share a row.
DECO_DEVICE float quad_sum(float x) {
  // region: first_shuffle_of_quad_sum
  x += shuffle_xor(x, 1);
  // end region
  return x + shuffle_xor(x, 2);
}

struct RowStatistics {
  RowPair mean, rstd;
};

// Sum of a lane's values of row i / 2 in N column tiles from j on, as a balanced tree: exact for equal values.
template <int N, int D>
DECO_DEVICE float pairwise_sum(const Tile<D>& tile, int i, int j = 0) {
  if constexpr (N == 1)
    return tile.v[j][i] + tile.v[j][i + 1];
  else
    return pairwise_sum<N / 2>(tile, i, j) + pairwise_sum<N / 2>(tile, i, j + N / 2);
}

// 1 / sqrt(variance + eps) from the sum of D squares; NaN if the sum is not finite.
template <int D>
DECO_DEVICE float reciprocal_deviation(float squares, float eps) {
  return fmaf(squares, 0.0f, rsqrt_approximate(fmaf(squares, 1.0f / D, eps)));
}

// Mean and rstd = 1 / sqrt(variance + eps) of each row, in two passes. rstd multiplies the error of the mean, by up to
// 1,000 at eps = 1e-6; the pairwise sum limits that error to a few roundings. Not centered, for RMSNorm: the mean is
// replaced by 0.
template <int D>
DECO_DEVICE RowStatistics statistics(const Tile<D>& h, float eps, bool centered = true) {
  const RowPair mean = {centered ? quad_sum(pairwise_sum<D / 8>(h, 0)) * (1.0f / D) : 0.0f,
                        centered ? quad_sum(pairwise_sum<D / 8>(h, 2)) * (1.0f / D) : 0.0f};
  RowPair squares = {0, 0};
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float centered = h.v[j][i] - mean.of(i);
      float& total = i < 2 ? squares.upper : squares.lower;
      total = fmaf(centered, centered, total);
    }
  return {
      mean,
      {reciprocal_deviation<D>(quad_sum(squares.upper), eps), reciprocal_deviation<D>(quad_sum(squares.lower), eps)}};
}

// (h - mean)·rstd
template <int D>
DECO_DEVICE Tile<D> normalized_by(const RowStatistics& s, Tile<D> h) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) h.v[j][i] = (h.v[j][i] - s.mean.of(i)) * s.rstd.of(i);
  return h;
}

// Replaces h by (h - mean)·rstd and returns rstd.
template <int D>
DECO_DEVICE RowPair normalize(Tile<D>& h, float eps, bool centered = true) {
  const RowStatistics s = statistics(h, eps, centered);
  h = normalized_by(s, h);
  return s.rstd;
}

// Gradient of the input of `normalize` from its result `normalized`, the gradient `grad` of the result, and rstd:
// total += rstd·(grad - mean(grad) - normalized·mean(grad·normalized)), not centered without mean(grad).
template <int D>
DECO_DEVICE void add_normalize_gradient(Tile<D>& total, const Tile<D>& grad, const Tile<D>& normalized, RowPair rstd,
                                        bool centered = true) {
  RowPair sum = {0, 0}, product = {0, 0};
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      (i < 2 ? sum.upper : sum.lower) += grad.v[j][i];
      float& p = i < 2 ? product.upper : product.lower;
      p = fmaf(grad.v[j][i], normalized.v[j][i], p);
    }
  const RowPair mean = {centered ? quad_sum(sum.upper) * (1.0f / D) : 0.0f,
                        centered ? quad_sum(sum.lower) * (1.0f / D) : 0.0f};
  const RowPair projection = {quad_sum(product.upper) * (1.0f / D), quad_sum(product.lower) * (1.0f / D)};
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inner = grad.v[j][i] - mean.of(i) - normalized.v[j][i] * projection.of(i);
      total.v[j][i] = fmaf(rstd.of(i), inner, total.v[j][i]);
    }
}

// ---- SiLU ---------------------------------------------------------------------------------------------------------

// SiLU(2x) = x + x·tanh(x); callers fold the factor 1/2 into the computation of x.
DECO_DEVICE float silu_of_double(float x) { return fmaf(x, tanh_approximate(x), x); }

struct SiluGradient {
  float value, slope;  // SiLU(2x) and its derivative with respect to x
};
DECO_DEVICE SiluGradient silu_of_double_gradient(float x) {
  const float tanh = tanh_approximate(x);
  const float value = fmaf(x, tanh, x);
  return {value, fmaf(value, 1.0f - tanh, 1.0f + tanh)};
}

}  // namespace deco::cuda
