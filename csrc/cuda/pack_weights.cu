// Packs the weights (packed_weights.h). One thread block per decoder block, and one for pixel_weight, the head and the
// pixel table. Moves about 2·(5D² + D·(C + P)) elements, negligible compared with the other kernels.
#include "cuda/packed_weights.h"

namespace deco::cuda {

namespace {

constexpr int kThreads = 256;

struct PackParams {
  PackedWeights packed;
  BlockWeightArrays blocks;
  DecoderWeightArrays decoder;  // without its decoder blocks
  int depth = 0, width = 0, matrices = 0, channels = 0, pixels = 0;

  template <class V>
  void visit(V& buffers) const {
    packed.visit(buffers, true, depth, width, matrices, pixels);
    const int64_t rows = int64_t{depth} * width, square = rows * width;
    const auto read = [&](const Array& array, int64_t count) {
      buffers.read(array.data, count * size_of(array.dtype));
    };
    read(blocks.norm_weight, rows);
    read(blocks.norm_bias, rows);
    read(blocks.mod_weight, 3 * square);
    read(blocks.mod_bias, 3 * rows);
    read(blocks.fc1_weight, square);
    read(blocks.fc1_bias, rows);
    read(blocks.fc2_weight, square);
    read(blocks.fc2_bias, rows);
    read(decoder.pixel_weight, int64_t{width} * channels);
    read(decoder.pixel_table, int64_t{pixels} * width);
    read(decoder.head_weight, int64_t{width} * channels);
    read(decoder.head_bias, channels);
  }
};

// Element (out, in) of packed matrix `which` of decoder block n.
DECO_DEVICE float packed_element(const PackParams& p, int n, int which, int out, int in) {
  const int64_t D = p.width, row = n * D + out, mod = ((3 * n) * D + out) * D + in;
  if (which == kFc1) return 0.5f * load_float(p.blocks.fc1_weight, row * D + in);
  if (which == kFc2) return load_float(p.blocks.fc2_weight, row * D + in);
  const float own = load_float(p.blocks.mod_weight, mod + which * D * D);
  if (which == kGate) return own;
  if (which == kScale) return load_float(p.blocks.norm_weight, row) * own;
  return fmaf(load_float(p.blocks.norm_bias, row), load_float(p.blocks.mod_weight, mod + D * D), own);
}

DECO_DEVICE float packed_bias(const PackParams& p, int n, int which, int out) {
  const int64_t D = p.width, row = n * D + out, mod = 3 * n * D + out;
  if (which == kFc1) return 0.5f * load_float(p.blocks.fc1_bias, row);
  if (which == kFc2) return load_float(p.blocks.fc2_bias, row);
  const float own = load_float(p.blocks.mod_bias, mod + which * D);
  if (which == kGate) return own;
  if (which == kScale) return load_float(p.blocks.norm_weight, row) * (1.0f + own);
  return fmaf(load_float(p.blocks.norm_bias, row), 1.0f + load_float(p.blocks.mod_bias, mod + D), own);
}

template <class T>
DECO_DEVICE void store_operand(void* array, int64_t index, float value) {
  store(static_cast<uint16_t*>(array) + index, static_cast<uint16_t>(pack<T>(value, 0.0f)));
}

// Value `slot` of the kBiasSlots after a row; the values sum to the bias in float32.
template <class T>
DECO_DEVICE float bias_part(float bias, int slot) {
  for (int i = 0; i < slot; ++i) bias -= low<T>(pack<T>(bias, 0.0f));
  return slot < kBiasParts ? bias : 0.0f;
}

template <class T>
DECO_DEVICE void pack_one_block(const PackParams& p, int n) {
  const int D = p.width, stride = D + kBiasSlots, rows = p.matrices * D;
  for (int i = thread(); i < rows * stride; i += block_threads()) {
    const int row = i / stride, column = i % stride, which = row / D, out = channel_of_column(row % D, D);
    const float value = column < D ? packed_element(p, n, which, out, channel_of_column(column, D))
                                   : bias_part<T>(packed_bias(p, n, which, out), column - D);
    store_operand<T>(p.packed.matrices, int64_t{n} * rows * stride + i, value);
  }
}

template <class T>
DECO_DEVICE void pack_ends(const PackParams& p) {
  const int D = p.width, C = p.channels, stride = D + kBiasSlots;
  for (int i = thread(); i < D * kChannelSlots; i += block_threads()) {
    const int out = channel_of_column(i / kChannelSlots, D), channel = i % kMaxChannels;
    store_operand<T>(p.packed.pixel, i, channel < C ? load_float(p.decoder.pixel_weight, out * C + channel) : 0.0f);
  }
  for (int i = thread(); i < kChannelSlots * stride; i += block_threads()) {
    const int channel = (i / stride) % kMaxChannels, column = i % stride;
    float value = 0.0f;
    if (channel < C)
      value = column < D ? load_float(p.decoder.head_weight, channel * D + channel_of_column(column, D))
                         : bias_part<T>(load_float(p.decoder.head_bias, channel), column - D);
    store_operand<T>(p.packed.head, i, value);
  }
  for (int i = thread(); i < p.pixels * D; i += block_threads())
    store(p.packed.table + i, load_float(p.decoder.pixel_table, i));
}

template <class T>
DECO_KERNEL(kThreads, 1, pack_kernel, const PackParams p) {
  if (block() < p.depth)
    pack_one_block<T>(p, block());
  else
    pack_ends<T>(p);
}

Status launch_pack(const Call& call, DType operand, const PackParams& p, int blocks) {
  const LaunchSize size = {blocks, kThreads, 0};
  return operand == DType::kBFloat16 ? launch("pack_weights", pack_kernel<BFloat16>, size, call.stream, p)
                                     : launch("pack_weights", pack_kernel<Float16>, size, call.stream, p);
}

}  // namespace

PackedWeights PackedWeights::take(WorkspaceParts& parts, int depth, int width, int matrices, int pixels) {
  PackedWeights packed;
  const int64_t rows = int64_t{depth} * matrices * width;
  packed.matrices = parts.take<uint16_t>(rows * (width + kBiasSlots));
  if (pixels > 0) {
    packed.pixel = parts.take<uint16_t>(kChannelSlots * width);
    packed.head = parts.take<uint16_t>(kChannelSlots * (width + kBiasSlots));
    packed.table = parts.take<float>(int64_t{pixels} * width);
  }
  return packed;
}

Status pack_decoder(const Call& call, DType operand, const PackedWeights& packed, const DecoderWeightArrays& weights,
                    const DecoderShape& shape) {
  PackParams p;
  p.packed = packed;
  p.blocks = weights.blocks;
  p.decoder = weights;
  p.depth = shape.depth;
  p.width = shape.decoder_width;
  p.matrices = kBlockMatrices;
  p.channels = shape.channels;
  p.pixels = shape.pixels_per_token();
  return launch_pack(call, operand, p, shape.depth + 1);
}

Status pack_block(const Call& call, DType operand, const PackedWeights& packed, const BlockWeightArrays& weights,
                  int width, int matrices) {
  PackParams p;
  p.packed = packed;
  p.blocks = weights;
  p.depth = 1;
  p.width = width;
  p.matrices = matrices;
  return launch_pack(call, operand, p, 1);
}

Status check_kernels() { return check("pack_weights", pack_kernel<BFloat16>); }

}  // namespace deco::cuda
