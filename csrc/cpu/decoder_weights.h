// Weights in the layout of the tile code: matrices rounded to the activation dtype, as in eager autocast, and stored as
// float or bfloat16 pairs; biases, norm weights and the pixel table converted to float without rounding. float32
// matrices are used in place.
#pragma once

#include "cpu/arena.h"
#include "cpu/matmul.h"
#include "deco/pixel_decoder.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kMaxDepth = 8, kMaxChannels = 4;

template <class Operand>
struct BlockWeights {
  using Element = typename Operand::Element;
  const Element* mod;                           // [3D][D], rows shift, scale, gate
  const Element* fc1;                           // [D][D]
  const Element* fc2;                           // [D][D]
  const float *mod_bias, *fc1_bias, *fc2_bias;  // [3D] with 1 added to the scale rows, [D], [D]
  const float *norm_weight, *norm_bias;         // [D]
};

// Matrices for matmuls with the transpose: a pair holds two adjacent rows, [out / kPack][in], or [in][out / kPack] for
// the tiles of AMX.
template <class Operand>
struct TransposedBlockWeights {
  using Element = typename Operand::Element;
  const Element *mod, *fc1, *fc2;
};

template <class Operand, int T>
struct DecoderWeights {
  int depth, channels;
  bool rms_norm;  // the head's norm: RMSNorm or LayerNorm
  float eps;
  BlockWeights<Operand> blocks[kMaxDepth];
  const float* pixel_weight;  // [D][C]
  const float* head_weight;   // [C][D]
  const float* head_bias;     // [C]
  const float* table;  // [panels][D][T]: pixel_table, channel-major, repeated where a token has fewer than T pixels
  int panels;
};

// ---- conversion ---------------------------------------------------------------------------------------------------

DECO_INLINE VecF round_vector(DType dtype, VecF x) {
  uint16_t bits[kLanes];
  if (dtype == DType::kFloat32) return x;
  if (dtype == DType::kBFloat16) {
    store_bf16(bits, x);
    return load_bf16(bits);
  }
  store_f16(bits, x);
  return load_f16(bits);
}

// The first `count` values of `from`, rounded to `rounding`.
inline void convert(float* to, const Array& from, int64_t count, DType rounding) {
  with_dtype(from.dtype, [&](auto dtype) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, round_vector(rounding, load_as<dtype.value>(from.data, i)));
    for (; i < count; ++i) to[i] = round_to(rounding, load_scalar(from.data, dtype, i));
  });
}

inline const float* take_floats(Arena& arena, const Array& from, int64_t count, DType rounding) {
  float* to = arena.take<float>(count);
  if (!arena.counts_only()) convert(to, from, count, rounding);
  return to;
}

// A stack of row-major matrices with `count` values in total.
template <class Operand>
const typename Operand::Element* take_matrices(Arena& arena, const Array& from, int64_t count, DType activation) {
  if constexpr (Operand::kPack == 1) {
    if (from.dtype == DType::kFloat32 && activation == DType::kFloat32) return static_cast<const float*>(from.data);
    return take_floats(arena, from, count, activation);
  } else {
    auto* to = arena.take<typename Operand::Element>(count / 2);
    if (!arena.counts_only())
      with_dtype(from.dtype, [&](auto dtype) {
        auto* halves = reinterpret_cast<uint16_t*>(to);
        for (int64_t i = 0; i < count; i += kLanes) store_bf16(halves + i, load_as<dtype.value>(from.data, i));
      });
    return to;
  }
}

// The same for matmuls with the transpose, of matrices of R rows, `rows` in total.
template <class Operand, int D, int R>
const typename Operand::Element* take_transposed(Arena& arena, const Array& from, int64_t rows, DType activation) {
  if constexpr (Operand::kPack == 1) {
    return take_matrices<Operand>(arena, from, rows * D, activation);
  } else {
    auto* to = arena.take<typename Operand::Element>(rows / 2 * D);
    if (!arena.counts_only())
      with_dtype(from.dtype, [&](auto dtype) {
        for (int64_t row = 0; row < rows; row += 2)
          for (int d = 0; d < D; d += kLanes) {
            const int64_t i = row * D + d;
            Operand::template put_transposed<D, R>(
                to + row / R * R / 2 * D, static_cast<int>(row % R / 2), d,
                make_pairs(load_as<dtype.value>(from.data, i), load_as<dtype.value>(from.data, i + D)));
          }
      });
    return to;
  }
}

// Order of the pixels of a patch in the table's panels: consecutive, repeated where a patch has fewer than T pixels.
struct RowOrder {
  int pixels;

  int pixel_at(int place) const { return place % pixels; }
  int place_of(int pixel) const { return pixel; }
};

// pixel_table [P][D] -> [panels][D][T].
template <int D, int T, class Order>
void make_table(float* table, int panels, const Array& pixel_table, Order order) {
  with_dtype(pixel_table.dtype, [&](auto dtype) {
    for (int panel = 0; panel < panels; ++panel, table += D * T)
      for (int first = 0; first < T; first += kLanes)
        for (int d = 0; d < D; d += kLanes) {
          VecF square[kLanes];
          unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
            const int pixel = order.pixel_at(panel * T + first + i);
            square[i] = load_as<dtype.value>(pixel_table.data, int64_t{pixel} * D + d);
          });
          transpose(square);
          unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { store(table + (d + i) * T + first, square[i]); });
        }
  });
}

// mod_bias [N][3D] with 1 added to the scale rows.
template <int D>
const float* take_mod_bias(Arena& arena, const Array& from, int depth) {
  float* to = arena.take<float>(depth * 3 * D);
  if (arena.counts_only()) return to;
  convert(to, from, depth * 3 * D, DType::kFloat32);
  for (int n = 0; n < depth; ++n)
    for (int d = D; d < 2 * D; ++d) to[n * 3 * D + d] += 1.0f;
  return to;
}

// Weights of one decoder block's modulation and LayerNorm; the other pointers stay null.
template <class Operand, int D>
BlockWeights<Operand> take_modulation_weights(Arena& arena, const BlockWeightArrays& from, DType activation) {
  BlockWeights<Operand> weights{};
  weights.mod = take_matrices<Operand>(arena, from.mod_weight, 3 * D * D, activation);
  weights.mod_bias = take_mod_bias<D>(arena, from.mod_bias, 1);
  weights.norm_weight = take_floats(arena, from.norm_weight, D, DType::kFloat32);
  weights.norm_bias = take_floats(arena, from.norm_bias, D, DType::kFloat32);
  return weights;
}

template <class Operand, int D>
void take_block_weights(Arena& arena, const BlockWeightArrays& from, int depth, DType activation,
                        BlockWeights<Operand>* blocks) {
  constexpr int kPack = Operand::kPack;
  const auto* mod = take_matrices<Operand>(arena, from.mod_weight, int64_t{depth} * 3 * D * D, activation);
  const auto* fc1 = take_matrices<Operand>(arena, from.fc1_weight, int64_t{depth} * D * D, activation);
  const auto* fc2 = take_matrices<Operand>(arena, from.fc2_weight, int64_t{depth} * D * D, activation);
  const float* mod_bias = take_mod_bias<D>(arena, from.mod_bias, depth);
  const float* fc1_bias = take_floats(arena, from.fc1_bias, depth * D, DType::kFloat32);
  const float* fc2_bias = take_floats(arena, from.fc2_bias, depth * D, DType::kFloat32);
  const float* norm_weight = take_floats(arena, from.norm_weight, depth * D, DType::kFloat32);
  const float* norm_bias = take_floats(arena, from.norm_bias, depth * D, DType::kFloat32);
  if (arena.counts_only()) return;
  for (int n = 0; n < depth; ++n)
    blocks[n] = {mod + n * 3 * D * D / kPack, fc1 + n * D * D / kPack, fc2 + n * D * D / kPack,
                 mod_bias + n * 3 * D,        fc1_bias + n * D,        fc2_bias + n * D,
                 norm_weight + n * D,         norm_bias + n * D};
}

template <class Operand, int D>
void take_transposed_block_weights(Arena& arena, const BlockWeightArrays& from, int depth, DType activation,
                                   TransposedBlockWeights<Operand>* blocks) {
  constexpr int kPack = Operand::kPack;
  const auto* mod = take_transposed<Operand, D, 3 * D>(arena, from.mod_weight, int64_t{depth} * 3 * D, activation);
  const auto* fc1 = take_transposed<Operand, D, D>(arena, from.fc1_weight, int64_t{depth} * D, activation);
  const auto* fc2 = take_transposed<Operand, D, D>(arena, from.fc2_weight, int64_t{depth} * D, activation);
  for (int n = 0; n < depth; ++n)
    blocks[n] = {mod + n * 3 * D * D / kPack, fc1 + n * D * D / kPack, fc2 + n * D * D / kPack};
}

template <class Operand, int D, int T, class Order>
void take_decoder_weights(Arena& arena, const DecoderWeightArrays& from, const DecoderShape& shape, int head_norm,
                          float eps, DType activation, Order order, DecoderWeights<Operand, T>& weights) {
  const int pixels = shape.pixels_per_token();
  weights.depth = shape.depth;
  weights.channels = shape.channels;
  weights.rms_norm = head_norm != 0;
  weights.eps = eps;
  take_block_weights<Operand, D>(arena, from.blocks, shape.depth, activation, weights.blocks);
  weights.pixel_weight = take_floats(arena, from.pixel_weight, D * shape.channels, activation);
  weights.head_weight = take_floats(arena, from.head_weight, D * shape.channels, activation);
  weights.head_bias = take_floats(arena, from.head_bias, shape.channels, DType::kFloat32);
  weights.panels = pixels > T ? pixels / T : 1;
  float* table = arena.take<float>(int64_t{weights.panels} * D * T);
  weights.table = table;
  if (!arena.counts_only()) make_table<D, T>(table, weights.panels, from.pixel_table, order);
}

template <class Operand, int D, int T>
void take_decoder_weights(Arena& arena, const DecoderWeightArrays& from, const DecoderShape& shape, int head_norm,
                          float eps, DType activation, DecoderWeights<Operand, T>& weights) {
  const RowOrder order = {shape.pixels_per_token()};
  take_decoder_weights<Operand, D, T>(arena, from, shape, head_norm, eps, activation, order, weights);
}

}  // namespace deco::cpu::DECO_CPU_ISA
