// Backward of pixel_decoder. The forward saves only its inputs. For one chunk of tokens at a time:
//   1. decoder_recompute.cu: the forward, with the inputs of the decoder blocks written to the workspace, and the
//      backward of the head
//   2. block_backward.cu: the backward of each decoder block, in reverse order
//   3. decoder_embedding.cu: the backward of the embedding
// Chunks accumulate sums over pixels in partial buffers, which are added in a fixed order at the end and converted to
// the gradients of the op's weights (gradient_sums.cu). The workspace holds 2·D·(N + 2) bytes per pixel of a chunk.
#include "cuda/block_backward.h"
#include "cuda/decoder_backward_kernels.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

namespace {

constexpr int64_t sums_of_channels(int width) { return int64_t{width + 1} * kChannelSlots; }

int64_t chunk_tokens(const DecoderShape& shape, int64_t chunk_pixels) {
  return std::min(shape.tokens(), std::max<int64_t>(1, chunk_pixels / shape.pixels_per_token()));
}

bool wants_weights(const DecoderWeightArrays& g) {
  return any(g.blocks) || g.pixel_weight.data != nullptr || g.pixel_table.data != nullptr ||
         g.head_weight.data != nullptr || g.head_bias.data != nullptr;
}

// Layout of the workspace.
struct Parts {
  PackedWeights packed;
  uint16_t *h, *s, *grad_h;              // operand tiles of a chunk
  float *blocks, *head, *pixel, *table;  // partials
  float *blocks_sum, *head_sum, *pixel_sum;
  int block_parts, recompute_parts, embedding_parts;
  int64_t bytes;

  Parts(void* workspace, const DeviceLimits& limits, const DecoderShape& shape, int64_t chunk_pixels) {
    WorkspaceParts parts(workspace);
    const int D = shape.decoder_width, N = shape.depth;
    const int64_t pixels = chunk_tokens(shape, chunk_pixels) * shape.pixels_per_token(), channels = sums_of_channels(D);
    const int64_t in_blocks = int64_t{N} * kBlockMatrices * D * (D + 1);
    packed = PackedWeights::take(parts, N, D, kBlockMatrices, shape.pixels_per_token());
    h = parts.take<uint16_t>(N * padded_rows(pixels) * D);
    s = parts.take<uint16_t>(padded_rows(pixels) * D);
    grad_h = parts.take<uint16_t>(padded_rows(pixels) * D);
    block_parts = block_backward_parts(limits, D, true, pixels);
    recompute_parts = decoder_recompute_parts(limits, D, pixels);
    embedding_parts = decoder_embedding_parts(limits, shape, pixels);
    blocks = parts.take<float>(block_parts * in_blocks);
    head = parts.take<float>(recompute_parts * channels);
    pixel = parts.take<float>(embedding_parts * channels);
    table = parts.take<float>(decoder_embedding_table_numbers(limits, shape, pixels));
    blocks_sum = parts.take<float>(in_blocks);
    head_sum = parts.take<float>(channels);
    pixel_sum = parts.take<float>(channels);
    bytes = parts.bytes();
  }
};

class Backward {
 public:
  Backward(const Call& call, const PixelDecoderBackward& op)
      : call_(call),
        op_(op),
        parts_(call.workspace, call.limits, op.shape, op.chunk_pixels),
        weights_(wants_weights(op.grad_weights)) {}

  Status run() {
    const DecoderShape& shape = op_.shape;
    const int64_t step = chunk_tokens(shape, op_.chunk_pixels);
    if (!add(pack_decoder(call_, op_.cond.dtype, parts_.packed, op_.weights, shape))) return status_;
    for (int64_t token = 0; token < shape.tokens(); token += step)
      if (!run_chunk(token, std::min(step, shape.tokens() - token))) return status_;
    if (weights_) sum_weights(step * shape.pixels_per_token());
    return status_;
  }

 private:
  // Stores the first failure; returns true if there has been none.
  bool add(const Status& status) {
    if (status_.ok()) status_ = status;
    return status_.ok();
  }

  bool run_chunk(int64_t token, int64_t tokens) {
    const DecoderShape& shape = op_.shape;
    const int P = shape.pixels_per_token(), D = shape.decoder_width;
    const int64_t pixels = tokens * P;
    PatchRows cond = rows_of(op_.cond, shape);
    cond.data = static_cast<uint16_t*>(cond.data) + token * cond.token_stride;

    DecoderRecompute recompute;
    recompute.packed = parts_.packed;
    recompute.shape = shape;
    recompute.image = Image(op_.image);
    recompute.grad_velocity = Image(op_.grad_velocity);
    recompute.cond = cond;
    recompute.first_pixel = token * P;
    recompute.pixels = pixels;
    recompute.eps = op_.eps;
    recompute.h_tiles = parts_.h;
    recompute.s_tiles = parts_.s;
    recompute.grad_h_tiles = parts_.grad_h;
    recompute.partials = weights_ ? parts_.head : nullptr;
    recompute.accumulate = token > 0;
    if (!add(decoder_recompute(call_, op_.cond.dtype, recompute))) return false;

    for (int l = shape.depth - 1; l >= 0; --l) {
      BlockBackward block;
      block.width = D;
      block.operand = op_.cond.dtype;
      block.pixels = static_cast<uint32_t>(pixels);
      block.eps = op_.eps;
      block.packed = parts_.packed;
      block.block = l;
      block.cond = cond;
      block.h_tiles = parts_.h + l * padded_rows(pixels) * D;
      block.s_tiles = parts_.s;
      block.grad_tiles = parts_.grad_h;
      if (op_.grad_cond.data != nullptr)
        block.grad_cond = {static_cast<uint16_t*>(op_.grad_cond.data) + token * P * D, D};
      block.first = l == shape.depth - 1;
      block.last = l == 0;
      block.partials = weights_ ? parts_.blocks : nullptr;
      block.depth = shape.depth;
      block.accumulate = token > 0;
      if (!add(block_backward(call_, block))) return false;
    }

    DecoderEmbedding embedding;
    embedding.packed = parts_.packed;
    embedding.shape = shape;
    embedding.image = Image(op_.image);
    embedding.grad_h_tiles = parts_.grad_h;
    embedding.grad_image = Image(op_.grad_image);
    embedding.first_pixel = token * P;
    embedding.pixels = pixels;
    embedding.partials = weights_ ? parts_.pixel : nullptr;
    embedding.table_partials = weights_ ? parts_.table : nullptr;
    embedding.accumulate = token > 0;
    if (!weights_ && op_.grad_image.data == nullptr) return true;
    return add(decoder_embedding(call_, op_.cond.dtype, embedding));
  }

  void sum_weights(int64_t chunk_pixels) {
    const DecoderShape& shape = op_.shape;
    const int D = shape.decoder_width;
    const int64_t in_blocks = int64_t{shape.depth} * kBlockMatrices * D * (D + 1), channels = sums_of_channels(D);
    if (!add(sum_partials(call_, parts_.blocks_sum, parts_.blocks, in_blocks, parts_.block_parts))) return;
    if (!add(sum_partials(call_, parts_.head_sum, parts_.head, channels, parts_.recompute_parts))) return;
    if (!add(sum_partials(call_, parts_.pixel_sum, parts_.pixel, channels, parts_.embedding_parts))) return;
    const GradientSums sums{parts_.blocks_sum, parts_.pixel_sum, parts_.head_sum};
    if (!add(unpack_decoder_gradients(call_, sums, op_.weights, op_.grad_weights, shape))) return;
    if (op_.grad_weights.pixel_table.data != nullptr)
      add(sum_table_partials(call_, op_.grad_weights.pixel_table, parts_.table, shape, chunk_pixels));
  }

  const Call& call_;
  const PixelDecoderBackward& op_;
  Parts parts_;
  bool weights_;
  Status status_;
};

}  // namespace

int64_t pixel_decoder_backward_workspace(const DeviceLimits& limits, const DecoderShape& shape, int64_t chunk_pixels) {
  return shape.pixels() == 0 ? 0 : Parts(nullptr, limits, shape, chunk_pixels).bytes;
}

Status pixel_decoder_backward(const Call& call, const PixelDecoderBackward& op) {
  if (call.workspace_bytes < pixel_decoder_backward_workspace(call.limits, op.shape, op.chunk_pixels))
    return {kWorkspaceTooSmall, "pixel_decoder_backward"};
  if (op.shape.pixels() >= kPixelLimit) return {kTooManyPixels, "pixel_decoder_backward"};
  if (op.shape.pixels() == 0) return {};
  return Backward(call, op).run();
}

}  // namespace deco::cuda
