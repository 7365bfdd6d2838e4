// Gradients of the weights. Each part adds its tiles in order to its own sums; at the end the parts are added in order.
// Results are bitwise reproducible for a given number of threads. Sums over pixels of a single channel stay separate
// per lane until the end.
#pragma once

#include <cstring>

#include "cpu/decoder_weights.h"

namespace deco::cpu::DECO_CPU_ISA {

template <int D>
struct alignas(64) BlockGradients {
  float mod_weight[3 * D][D], fc1_weight[D][D], fc2_weight[D][D];
  float mod_bias[3 * D][kLanes], fc1_bias[D][kLanes], fc2_bias[D][kLanes];
  float norm_weight[D][kLanes], norm_bias[D][kLanes];
};

// Gradients of the query and the head; the image channel is the leading index because C varies.
template <int D>
struct alignas(64) QueryHeadGradients {
  float pixel_weight[kMaxChannels][D][kLanes];
  float head_weight[kMaxChannels][D][kLanes], head_bias[kMaxChannels][kLanes];
};

// Sums of all parts; those of part i begin at sums + i * stride, in floats.
struct PartSums {
  const float* sums;
  int64_t stride;
  int parts;
};

// to[offset + i] = sum over parts of sums[i]; `count` is a multiple of kLanes.
inline void add_parts(const PartSums& from, const Array& to, int64_t offset, int64_t count) {
  if (to.data == nullptr) return;
  with_dtype(to.dtype, [&](auto dtype) {
    for (int64_t i = 0; i < count; i += kLanes) {
      VecF total = load(from.sums + i);
      for (int part = 1; part < from.parts; ++part) total = total + load(from.sums + part * from.stride + i);
      store_as<dtype.value>(to.data, offset + i, total);
    }
  });
}

// to[offset + i * step] = sum over parts and lanes of sums[i * kLanes + lane].
inline void add_parts_and_lanes(const PartSums& from, const Array& to, int64_t offset, int64_t count,
                                int64_t step = 1) {
  if (to.data == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    VecF total = load(from.sums + i * kLanes);
    for (int part = 1; part < from.parts; ++part) total = total + load(from.sums + part * from.stride + i * kLanes);
    store_scalar(to.data, to.dtype, offset + i * step, sum(total));
  }
}

// Gradients of decoder block `index`: `block` holds the sums of the first part; parts are `bytes` apart.
template <int D>
void add_block_parts(const BlockGradients<D>& block, size_t bytes, int parts, int index, const BlockWeightArrays& to) {
  const int64_t stride = static_cast<int64_t>(bytes / sizeof(float));
  const auto from = [&](const float* member) { return PartSums{member, stride, parts}; };
  add_parts(from(block.mod_weight[0]), to.mod_weight, index * 3 * D * D, 3 * D * D);
  add_parts(from(block.fc1_weight[0]), to.fc1_weight, index * D * D, D * D);
  add_parts(from(block.fc2_weight[0]), to.fc2_weight, index * D * D, D * D);
  add_parts_and_lanes(from(block.mod_bias[0]), to.mod_bias, index * 3 * D, 3 * D);
  add_parts_and_lanes(from(block.fc1_bias[0]), to.fc1_bias, index * D, D);
  add_parts_and_lanes(from(block.fc2_bias[0]), to.fc2_bias, index * D, D);
  add_parts_and_lanes(from(block.norm_weight[0]), to.norm_weight, index * D, D);
  add_parts_and_lanes(from(block.norm_bias[0]), to.norm_bias, index * D, D);
}

// `gradients` has one entry per part.
template <int D>
void add_query_head_parts(const QueryHeadGradients<D>* gradients, int channels, int parts,
                          const DecoderWeightArrays& to) {
  constexpr int64_t kStride = sizeof(QueryHeadGradients<D>) / sizeof(float);
  const auto from = [&](const float* member) { return PartSums{member, kStride, parts}; };
  for (int c = 0; c < channels; ++c) {
    add_parts_and_lanes(from(gradients->pixel_weight[c][0]), to.pixel_weight, c, D, channels);
    add_parts_and_lanes(from(gradients->head_weight[c][0]), to.head_weight, c * D, D);
  }
  add_parts_and_lanes(from(gradients->head_bias[0]), to.head_bias, 0, channels);
}

// Gradient of pixel_table [P][D] from sums [panels][D][T] per part; with P < T several columns belong to one pixel.
template <int D, int T, class Order>
void add_table_parts(const float* sums, int panels, int parts, int pixels, Order order, const Array& to) {
  if (to.data == nullptr) return;
  const int64_t stride = int64_t{panels} * D * T;
  for (int pixel = 0; pixel < pixels; ++pixel) {
    const int place = order.place_of(pixel);
    for (int d = 0; d < D; ++d) {
      float total = 0.0f;
      for (int part = 0; part < parts; ++part) {
        const float* row = sums + part * stride + place / T * D * T + d * T;
        for (int column = place % T; column < T; column += pixels) total += row[column];
      }
      store_scalar(to.data, to.dtype, int64_t{pixel} * D + d, total);
    }
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
