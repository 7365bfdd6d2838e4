// Adds the partial sums of thread blocks and converts gradients of packed weights to gradients of the op's weights,
// both in a fixed order.
#include "cuda/gradient_sums.h"

namespace deco::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// ---- sums over parts ------------------------------------------------------------------------------------------------

constexpr int kColumns = 32, kSlices = kThreads / kColumns;

struct SumParams {
  float* sums;
  const float* partials;
  int64_t numbers;
  int parts;

  template <class V>
  void visit(V& buffers) const {
    buffers.write(sums, 4 * numbers);
    buffers.read(partials, 4 * numbers * parts);
  }
};

// A thread block sums 32 numbers: each of eight slices adds every eighth part, then the slices are added in order.
DECO_KERNEL(kThreads, 1, sum_kernel, const SumParams p) {
  auto* slices = reinterpret_cast<float*>(shared_memory());
  const int column = thread() % kColumns, slice = thread() / kColumns;
  const int64_t i = int64_t{block()} * kColumns + column;
  float sum = 0.0f;
  if (i < p.numbers)
    for (int part = slice; part < p.parts; part += kSlices) sum += load(p.partials + part * p.numbers + i);
  store(slices + thread(), sum);
  block_barrier();
  if (slice == 0 && i < p.numbers) {
    float total = 0.0f;
    for (int s = 0; s < kSlices; ++s) total += load(slices + s * kColumns + column);
    store(p.sums + i, total);
  }
}

// ---- from packed to unpacked ----------------------------------------------------------------------------------------

struct UnpackParams {
  GradientSums sums;
  BlockWeightArrays weights, gradients;
  DecoderWeightArrays ends;  // gradients; only pixel_weight, head_weight and head_bias are written
  int depth = 0, width = 0, matrices = 0, channels = 0;

  template <class V>
  void visit(V& buffers) const {
    const int64_t rows = int64_t{depth} * width, square = rows * width;
    buffers.read(sums.blocks, 4 * rows * matrices * (width + 1));
    buffers.read(sums.pixel, 4 * kChannelSlots * (width + 1));
    buffers.read(sums.head, 4 * kChannelSlots * (width + 1));
    const auto both = [&](const Array& weight, const Array& gradient, int64_t count) {
      buffers.read(weight.data, count * size_of(weight.dtype));
      buffers.write(gradient.data, count * size_of(gradient.dtype));
    };
    both(weights.norm_weight, gradients.norm_weight, rows);
    both(weights.norm_bias, gradients.norm_bias, rows);
    both(weights.mod_weight, gradients.mod_weight, 3 * square);
    both(weights.mod_bias, gradients.mod_bias, 3 * rows);
    both({}, gradients.fc1_weight, square);
    both({}, gradients.fc1_bias, rows);
    both({}, gradients.fc2_weight, square);
    both({}, gradients.fc2_bias, rows);
    both({}, ends.pixel_weight, int64_t{width} * channels);
    both({}, ends.head_weight, int64_t{width} * channels);
    both({}, ends.head_bias, channels);
  }
};

DECO_DEVICE void put(const Array& array, int64_t index, float value) {
  if (array.data != nullptr) store_float(array, index, value);
}

// Summed gradient of packed matrix `which` of decoder block n at channels (out, in), not permuted; in = width: the
// bias.
DECO_DEVICE float packed_gradient(const UnpackParams& p, int n, int which, int out, int in) {
  const int64_t D = p.width, row = (int64_t{n} * p.matrices + which) * D + column_of_channel(out, p.width);
  return load(p.sums.blocks + row * (D + 1) + (in < D ? column_of_channel(in, p.width) : D));
}

// Gradients of one row of a decoder block's modulation and of its LayerNorm channel, by one warp.
DECO_DEVICE void unpack_modulation(const UnpackParams& p, int n, int out) {
  const int D = p.width;
  const int64_t row = int64_t{n} * D + out, mod_row = 3 * int64_t{n} * D + out;
  const float norm_weight = load_float(p.weights.norm_weight, row), norm_bias = load_float(p.weights.norm_bias, row);
  float norm_weight_sum = 0.0f, norm_bias_sum = 0.0f;
  for (int in = lane(); in <= D; in += 32) {
    const bool is_bias = in == D;
    const Array& weights = is_bias ? p.weights.mod_bias : p.weights.mod_weight;
    const Array& gradients = is_bias ? p.gradients.mod_bias : p.gradients.mod_weight;
    const int64_t step = is_bias ? D : int64_t{D} * D, first = is_bias ? mod_row : mod_row * D + in;
    const float shift = packed_gradient(p, n, kShift, out, in), scale = packed_gradient(p, n, kScale, out, in);
    const float own = load_float(weights, first + step) + (is_bias ? 1.0f : 0.0f);
    norm_weight_sum = fmaf(scale, own, norm_weight_sum);
    norm_bias_sum = fmaf(shift, own, norm_bias_sum);
    put(gradients, first, shift);
    put(gradients, first + step, fmaf(norm_weight, scale, norm_bias * shift));
    put(gradients, first + 2 * step, packed_gradient(p, n, kGate, out, in));
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    norm_weight_sum += shuffle_xor(norm_weight_sum, mask);
    norm_bias_sum += shuffle_xor(norm_bias_sum, mask);
  }
  if (lane() == 0) {
    put(p.gradients.norm_weight, row, norm_weight_sum);
    put(p.gradients.norm_bias, row, norm_bias_sum);
  }
}

DECO_DEVICE void unpack_mlp(const UnpackParams& p, int n, int out) {
  const int D = p.width;
  const int64_t row = int64_t{n} * D + out;
  for (int in = lane(); in < D; in += 32) {
    put(p.gradients.fc1_weight, row * D + in, 0.5f * packed_gradient(p, n, kFc1, out, in));
    put(p.gradients.fc2_weight, row * D + in, packed_gradient(p, n, kFc2, out, in));
  }
  if (lane() == 0) {
    put(p.gradients.fc1_bias, row, 0.5f * packed_gradient(p, n, kFc1, out, D));
    put(p.gradients.fc2_bias, row, packed_gradient(p, n, kFc2, out, D));
  }
}

// Slots c and c + kMaxChannels hold the values of channel c and the remainders of their rounding.
DECO_DEVICE float channel_sum(const float* numbers, int row, int channel) {
  return load(numbers + row * kChannelSlots + channel) + load(numbers + row * kChannelSlots + kMaxChannels + channel);
}

DECO_DEVICE void unpack_ends(const UnpackParams& p) {
  const int D = p.width, C = p.channels;
  for (int i = thread(); i < D * C; i += block_threads()) {
    put(p.ends.pixel_weight, i, channel_sum(p.sums.pixel, column_of_channel(i / C, D), i % C));
    put(p.ends.head_weight, i, channel_sum(p.sums.head, column_of_channel(i % D, D), i / D));
  }
  for (int c = thread(); c < C; c += block_threads()) put(p.ends.head_bias, c, channel_sum(p.sums.head, D, c));
}

// One warp per output channel of the decoder blocks, and a thread block for pixel_weight and the head.
DECO_KERNEL(kThreads, 1, unpack_kernel, const UnpackParams p) {
  const int row = block() * kWarps + warp(), n = row / p.width, out = row % p.width;
  if (n >= p.depth) {
    unpack_ends(p);
    return;
  }
  unpack_modulation(p, n, out);
  if (p.matrices == kBlockMatrices) unpack_mlp(p, n, out);
}

// Thread blocks for the decoder blocks; a thread block has rows of one of them.
int row_blocks(int depth, int width) {
  static_assert(16 % kWarps == 0, "widths are multiples of 16");
  return depth * width / kWarps;
}

}  // namespace

Status sum_partials(const Call& call, float* sums, const float* partials, int64_t numbers, int parts) {
  const LaunchSize size = {static_cast<int>((numbers + kColumns - 1) / kColumns), kThreads, kThreads * 4};
  return launch("sum_partials", sum_kernel, size, call.stream, SumParams{sums, partials, numbers, parts});
}

Status unpack_decoder_gradients(const Call& call, const GradientSums& sums, const DecoderWeightArrays& weights,
                                const DecoderWeightArrays& gradients, const DecoderShape& shape) {
  UnpackParams p;
  p.sums = sums;
  p.weights = weights.blocks;
  p.gradients = gradients.blocks;
  p.ends = gradients;
  p.depth = shape.depth;
  p.width = shape.decoder_width;
  p.matrices = kBlockMatrices;
  p.channels = shape.channels;
  return launch("unpack_gradients", unpack_kernel, {row_blocks(shape.depth, shape.decoder_width) + 1, kThreads, 0},
                call.stream, p);
}

Status unpack_block_gradients(const Call& call, const GradientSums& sums, const BlockWeightArrays& weights,
                              const BlockWeightArrays& gradients, int width, int matrices) {
  UnpackParams p;
  p.sums = sums;
  p.weights = weights;
  p.gradients = gradients;
  p.depth = 1;
  p.width = width;
  p.matrices = matrices;
  return launch("unpack_gradients", unpack_kernel, {row_blocks(1, width), kThreads, 0}, call.stream, p);
}

}  // namespace deco::cuda
