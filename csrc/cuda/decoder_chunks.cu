#include "cuda/decoder_chunks.h"

namespace deco::cuda {

namespace {

constexpr int64_t sums_of_channels(int width) { return int64_t{width + 1} * kChannelSlots; }
constexpr int64_t sums_of_blocks(int width, int depth) { return int64_t{depth} * kBlockMatrices * width * (width + 1); }

}  // namespace

DecoderChunks::DecoderChunks(WorkspaceParts& parts, const DeviceLimits& limits, const DecoderShape& shape,
                             int64_t pixels, int head_parts, const void* activations)
    : width_(shape.decoder_width), depth_(shape.depth), head_parts_(head_parts), pixels_(pixels) {
  const int D = width_, N = shape.depth;
  const int64_t in_blocks = sums_of_blocks(D, N), channels = sums_of_channels(D);
  packed_ = PackedWeights::take(parts, N, D, kBlockMatrices, shape.pixels_per_token());
  const int64_t of_block = tiled_values(pixels, D);
  if (activations == nullptr) {
    h_ = parts.take<uint16_t>((N + 1) * of_block);
    s_ = parts.take<uint16_t>(of_block);
  } else {
    h_ = static_cast<uint16_t*>(const_cast<void*>(activations));  // only read
    s_ = h_ + (N + 1) * of_block;
    grad_h_ = parts.take<uint16_t>(of_block);
  }
  block_parts_ = block_backward_parts(limits, D, true, pixels);
  embedding_parts_ = decoder_embedding_parts(limits, shape, pixels);
  blocks_ = parts.take<float>(block_parts_ * in_blocks);
  head_ = parts.take<float>(head_parts_ * channels);
  pixel_ = parts.take<float>(embedding_parts_ * channels);
  table_ = parts.take<float>(decoder_embedding_table_numbers(limits, shape, pixels));
  blocks_sum_ = parts.take<float>(in_blocks);
  head_sum_ = parts.take<float>(channels);
  pixel_sum_ = parts.take<float>(channels);
}

Status DecoderChunks::head(const Call& call, DType operand, float eps, bool rms, const DecoderChunk& chunk,
                           const Image& grad_velocity, bool sums) const {
  DecoderHead head;
  head.packed = packed_;
  head.shape = chunk.shape;
  head.grad_velocity = grad_velocity;
  head.eps = eps;
  head.h_tiles = h_tiles(depth_, chunk.pixels);
  head.grad_h_tiles = grad_h_tiles(chunk.pixels);
  head.partials = sums ? head_ : nullptr;
  head.accumulate = chunk.accumulate;
  return decoder_head(call, operand, head, rms);
}

Status DecoderChunks::backward(const Call& call, DType operand, float eps, const DecoderChunk& chunk, bool sums) const {
  uint16_t* const grad_h = grad_h_tiles(chunk.pixels);
  for (int l = depth_ - 1; l >= 0; --l) {
    BlockBackward block;
    block.width = width_;
    block.operand = operand;
    block.pixels = static_cast<uint32_t>(chunk.pixels);
    block.eps = eps;
    block.packed = packed_;
    block.block = l;
    block.cond = chunk.cond;
    block.h_tiles = h_tiles(l, chunk.pixels);
    block.s_tiles = s_;
    block.grad_tiles = grad_h;
    block.grad_cond = chunk.grad_cond;
    block.first = l == depth_ - 1;
    block.last = l == 0;
    block.partials = sums ? blocks_ : nullptr;
    block.depth = depth_;
    block.accumulate = chunk.accumulate;
    const Status status = block_backward(call, block);
    if (!status.ok()) return status;
  }
  if (!sums && chunk.grad_image.data == nullptr && chunk.grad_query.data == nullptr) return {};
  DecoderEmbedding embedding;
  embedding.packed = packed_;
  embedding.shape = chunk.shape;
  embedding.image = chunk.image;
  embedding.grad_h_tiles = grad_h;
  embedding.grad_image = chunk.grad_image;
  embedding.first_pixel = chunk.first_pixel;
  embedding.pixels = chunk.pixels;
  embedding.partials = sums ? pixel_ : nullptr;
  embedding.table_partials = sums ? table_ : nullptr;
  embedding.accumulate = chunk.accumulate;
  return decoder_embedding(call, operand, embedding, chunk.grad_query);
}

Status DecoderChunks::sum_weights(const Call& call, const DecoderShape& shape, const DecoderWeightArrays& weights,
                                  const DecoderWeightArrays& gradients) const {
  const int64_t in_blocks = sums_of_blocks(width_, shape.depth), channels = sums_of_channels(width_);
  Status status = sum_partials(call, blocks_sum_, blocks_, in_blocks, block_parts_);
  if (status.ok()) status = sum_partials(call, head_sum_, head_, channels, head_parts_);
  if (status.ok()) status = sum_partials(call, pixel_sum_, pixel_, channels, embedding_parts_);
  const GradientSums sums{blocks_sum_, pixel_sum_, head_sum_};
  if (status.ok()) status = unpack_decoder_gradients(call, sums, weights, gradients, shape);
  if (status.ok() && gradients.pixel_table.data != nullptr)
    status = sum_table_partials(call, gradients.pixel_table, table_, shape, pixels_);
  return status;
}

}  // namespace deco::cuda
