// Packs the weights (packed_weights.h). One warp per row of a packed tensor, so that N·M·D + D + 8 + P warps share the
// latency of few loads each: at batch 1 the kernels behind it wait for this one.
#include "cuda/packed_weights.h"

namespace deco::cuda {

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

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

// The D weights and the bias slots behind them, in packed order.
template <class T, class Weight>
DECO_DEVICE void pack_row(void* array, int64_t row, int D, float bias, const Weight& weight) {
  const int stride = D + kBiasSlots;
  for (int column = lane(); column < stride; column += 32)
    store_operand<T>(array, row * stride + column,
                     column < D ? weight(channel_of_column(column, D)) : bias_part<T>(bias, column - D));
}

template <class T>
DECO_DEVICE void pack_matrix_row(const PackParams& p, int row) {
  const int D = p.width, matrix = row / D, n = matrix / p.matrices, which = matrix % p.matrices;
  const int out = channel_of_column(row % D, D);
  pack_row<T>(p.packed.matrices, row, D, packed_bias(p, n, which, out),
              [&](int in) { return packed_element(p, n, which, out, in); });
}

template <class T>
DECO_DEVICE void pack_pixel_row(const PackParams& p, int row) {
  const int out = channel_of_column(row, p.width), C = p.channels, channel = lane() % kMaxChannels;
  if (lane() < kChannelSlots)
    store_operand<T>(p.packed.pixel, row * kChannelSlots + lane(),
                     channel < C ? load_float(p.decoder.pixel_weight, out * C + channel) : 0.0f);
}

template <class T>
DECO_DEVICE void pack_head_row(const PackParams& p, int row) {
  const int D = p.width, channel = row % kMaxChannels;
  const bool given = channel < p.channels;
  pack_row<T>(p.packed.head, row, D, given ? load_float(p.decoder.head_bias, channel) : 0.0f,
              [&](int in) { return given ? load_float(p.decoder.head_weight, channel * D + in) : 0.0f; });
}

// Row of the table in the layout of Tile: column tile j of row g or g + 8 is elements 0, 1 or 2, 3 of lanes 4g + t.
DECO_DEVICE void pack_table_row(const PackParams& p, int row) {
  const int D = p.width, in_tile = row % kTilePixels;
  float* tile = p.packed.table + row / kTilePixels * (kTilePixels * D);
  for (int column = lane(); column < D; column += 32) {
    const int j = column / 8, t = column / 2 % 4, element = 2 * (in_tile / 8) + column % 2;
    store(tile + (32 * j + 4 * (in_tile % 8) + t) * 4 + element,
          load_float(p.decoder.pixel_table, row % p.pixels * D + channel_of_column(column, D)));
  }
}

template <class T>
DECO_KERNEL(kThreads, 1, pack_kernel, const PackParams p) {
  int row = block() * kWarps + warp();
  const int matrix_rows = p.depth * p.matrices * p.width;
  if (row < matrix_rows) return pack_matrix_row<T>(p, row);
  row -= matrix_rows;
  if (p.pixels == 0) return;  // weights of a single decoder block
  if (row < p.width) return pack_pixel_row<T>(p, row);
  row -= p.width;
  if (row < kChannelSlots) return pack_head_row<T>(p, row);
  row -= kChannelSlots;
  if (row < table_rows(p.pixels)) pack_table_row(p, row);
}

Status launch_pack(const Call& call, DType operand, const PackParams& p) {
  const int rows = p.depth * p.matrices * p.width + (p.pixels > 0 ? p.width + kChannelSlots + table_rows(p.pixels) : 0);
  const LaunchSize size = {(rows + kWarps - 1) / kWarps, kThreads, 0};
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
    packed.table = parts.take<float>(int64_t{table_rows(pixels)} * width);
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
  return launch_pack(call, operand, p);
}

Status pack_block(const Call& call, DType operand, const PackedWeights& packed, const BlockWeightArrays& weights,
                  int width, int matrices) {
  PackParams p;
  p.packed = packed;
  p.blocks = weights;
  p.depth = 1;
  p.width = width;
  p.matrices = matrices;
  return launch_pack(call, operand, p);
}

Status check_kernels() { return check("pack_weights", pack_kernel<BFloat16>); }

}  // namespace deco::cuda
