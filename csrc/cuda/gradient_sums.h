// Weight gradients: sums over pixels within a thread block, sums over thread blocks, and conversion from packed to
// unpacked gradients.
//
// Deterministic without atomics: each warp or thread block writes its partial sum to its own location, and the partial
// sums are added in a fixed order. The same grid gives the same bits; the grid depends only on the device and the
// sizes.
#pragma once

#include "cuda/packed_weights.h"

namespace deco::cuda {

// ---- operand tile in shared memory ----------------------------------------------------------------------------------

// [16 pixels][D], from a multiple of 128 bytes on. The parts of 16 bytes of a row are permuted, so that the same part of
// eight consecutive rows lies in different banks. The first element of part `part` of row `row`:
template <int D>
DECO_DEVICE int operand_element(int row, int part) {
  constexpr int kRowsOf128Bytes = 64 / D, kParts = D / 8;
  return row * D + 8 * (part ^ (row / kRowsOf128Bytes & (kParts - 1)));
}
// From the first element of part p to that of part p + 2k, for p < 2.
DECO_DEVICE int parts_later(int element, int k) { return element ^ 16 * k; }

template <class T, int D>
DECO_DEVICE void store_operand_tile(T* tile, const Operand<D>& operand) {
  const int element = operand_element<D>(lane() & 15, lane() >> 4);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) store_matrices(tile + parts_later(element, k), operand.k_step[k]);
}

// Inverse of store_operand_tile.
template <class T, int D>
DECO_DEVICE Operand<D> load_operand_tile(const T* tile) {
  Operand<D> operand;
  const int element = operand_element<D>(lane() & 15, lane() >> 4);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) load_matrices(operand.k_step[k], tile + parts_later(element, k));
  return operand;
}

// ---- gradient of one D x D matrix and its bias, summed by one warp --------------------------------------------------

template <class T, int D>
struct MatrixGradient {
  float weight[D / 16][D / 8][4];  // [u]: outputs 16u + g and 16u + g + 8, in the layout of Tile
  float bias[4];                   // column u: sums of outputs 16u + g and 16u + g + 8

  DECO_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = 0.0f;
#pragma unroll
      for (int u = 0; u < D / 16; ++u)
#pragma unroll
        for (int j = 0; j < D / 8; ++j) weight[u][j][i] = 0.0f;
    }
  }

  // What does not change from sum to sum, in registers.
  struct Lane {
    const T *output[D / 16], *input[D / 16];  // its rows of two operand tiles in shared memory
    uint32_t ones[D / 16][2];                 // right operands with ones in column u

    DECO_DEVICE Lane(const T* output_tile, const T* input_tile) {
      const int of_output = operand_element<D>((lane() & 7) + (lane() >> 4) * 8, (lane() >> 3) & 1);
      const int of_input = operand_element<D>(lane() & 15, lane() >> 4);
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        output[k] = held(output_tile + parts_later(of_output, k));
        input[k] = held(input_tile + parts_later(of_input, k));
        const uint32_t one = lane() >> 2 == k ? T::kOne * 0x10001u : 0u;
        ones[k][0] = shuffle_xor(one, 1);  // in two registers, like bias_selector_in_two_registers
        ones[k][1] = shuffle_xor(one, 2);
      }
    }
  };

  // Adds outputᵀ·input over the 16 pixels of the tiles that are `elements` behind those of `own`.
  DECO_DEVICE void add(const Lane& own, int elements) {
    uint32_t right[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrices_transposed(right[k], own.input[k] + elements);
#pragma unroll
    for (int u = 0; u < D / 16; ++u) {
      uint32_t left[4];
      load_matrices_transposed(left, own.output[u] + elements);
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const uint32_t first[2] = {right[k][0], right[k][1]}, second[2] = {right[k][2], right[k][3]};
        multiply<T>(weight[u][2 * k], left, first, weight[u][2 * k]);
        multiply<T>(weight[u][2 * k + 1], left, second, weight[u][2 * k + 1]);
      }
      multiply<T>(bias, left, own.ones[u], bias);
    }
  }

  // Writes rows of D weights and the bias, or adds them to `rows` if `accumulate`.
  DECO_DEVICE void write(float* rows, bool accumulate) const {
    const auto put = [&](int row, int column, float value) {
      float* place = rows + row * (D + 1) + column;
      store(place, accumulate ? load(place) + value : value);
    };
    const int g = lane() >> 2, t = lane() & 3;
#pragma unroll
    for (int u = 0; u < D / 16; ++u)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = 16 * u + g + 4 * i;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          put(row, 8 * j + 2 * t, weight[u][j][i]);
          put(row, 8 * j + 2 * t + 1, weight[u][j][i + 1]);
        }
        if (t == u / 2) put(row, D, bias[i + u % 2]);
      }
  }
};

// Adds the sums of all warps in shared memory, `count` numbers per warp, and writes them to `numbers`, or adds them to it
// if `accumulate`. Called by all threads after a barrier.
DECO_DEVICE void write_sums_of_warps(float* numbers, const float* shared, int count, bool accumulate) {
  for (int i = thread(); i < count; i += block_threads()) {
    float value = accumulate ? load(numbers + i) : 0.0f;
    for (int w = 0; w < block_threads() / 32; ++w) value += load(shared + w * count + i);
    store(numbers + i, value);
  }
}

// ---- gradient of a matrix between D channels and the channel slots of images ----------------------------------------

// Sums over pixels of h ⊗ x, D x kChannelSlots, and of x, by one warp.
template <class T, int D>
struct ChannelGradient {
  static constexpr int kNumbers = (D + 1) * kChannelSlots;

  float outer[D / 16][4];
  float sum;  // slot g, over the lane's pixels

  DECO_DEVICE void clear() {
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) outer[k][i] = 0.0f;
    sum = 0.0f;
  }

  // h and x are left operands of 16 pixels, x in the layout of channel_words.
  DECO_DEVICE void add(const Operand<D>& h, const uint32_t (&x)[2]) {
    const uint32_t right[2] = {transpose(x[0]), transpose(x[1])};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t left[4] = {
          transpose(h.k_step[k][0]),
          // region: bottom_left_quadrant
          transpose(h.k_step[k][2]),
          // end region
          // region: top_right_quadrant
          transpose(h.k_step[k][1]),
          // end region
          transpose(h.k_step[k][3]),
      };
      multiply<T>(outer[k], left, right, outer[k]);
    }
    sum += (low<T>(right[0]) + high<T>(right[0])) + (low<T>(right[1]) + high<T>(right[1]));
  }

  // Adds the sums of all warps in shared memory, kNumbers floats per warp, and writes them. Called by all threads.
  DECO_DEVICE void write(float* numbers, float* shared, bool accumulate) const {
    const int g = lane() >> 2, t = lane() & 3;
    float* own = shared + warp() * kNumbers;
    block_barrier();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) store(own + (16 * k + g + 8 * (i / 2)) * kChannelSlots + 2 * t + i % 2, outer[k][i]);
    const float total = quad_sum(sum);
    if (t == 0) store(own + D * kChannelSlots + g, total);
    block_barrier();
    write_sums_of_warps(numbers, shared, kNumbers, accumulate);
  }
};

// True if any gradient of the decoder block's weights is requested.
inline bool any(const BlockWeightArrays& b) {
  for (const Array* array : {&b.norm_weight, &b.norm_bias, &b.mod_weight, &b.mod_bias, &b.fc1_weight, &b.fc1_bias,
                             &b.fc2_weight, &b.fc2_bias})
    if (array->data != nullptr) return true;
  return false;
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// sums[i] = sum over `parts` of partials[part][i].
Status sum_partials(const Call& call, float* sums, const float* partials, int64_t numbers, int parts);

// Summed gradients of packed weights; null: not requested.
struct GradientSums {
  const float* blocks = nullptr;  // [N, M, D, D + 1]: rows of weights and bias
  const float* pixel = nullptr;   // [D + 1, kChannelSlots]
  const float* head = nullptr;    // [D + 1, kChannelSlots]
};

// Transpose of pack_decoder and pack_block: writes the gradients of the op's weights that are not null, in their
// dtypes.
Status unpack_decoder_gradients(const Call& call, const GradientSums& sums, const DecoderWeightArrays& weights,
                                const DecoderWeightArrays& gradients, const DecoderShape& shape);
Status unpack_block_gradients(const Call& call, const GradientSums& sums, const BlockWeightArrays& weights,
                              const BlockWeightArrays& gradients, int width, int matrices);

}  // namespace deco::cuda
