// Backward of pixel_decoder. If the forward has saved only its inputs, for one chunk of tokens at a time:
//   1. decoder_recompute.cu: the forward, with the inputs of the decoder blocks written to the workspace, and the
//      backward of the head
//   2. decoder_chunks.cu: the backward of each decoder block, in reverse order, and of the embedding
// If it has kept its activations, there is one chunk, and decoder_head.cu takes the place of decoder_recompute.cu.
#include "cuda/decoder_chunks.h"

namespace deco::cuda {

namespace {

// Pixels of the largest chunk: whole tokens.
int64_t largest_chunk(const PixelDecoderBackward& op) {
  const DecoderShape& shape = op.shape;
  if (op.activations != nullptr) return shape.pixels();
  const int P = shape.pixels_per_token();
  return P * std::min(shape.tokens(), std::max<int64_t>(1, op.chunk_pixels / P));
}

DecoderChunks take_chunks(WorkspaceParts& parts, const DeviceLimits& limits, const PixelDecoderBackward& op) {
  const int64_t pixels = largest_chunk(op);
  const int width = op.shape.decoder_width;
  const int head_parts = op.activations != nullptr ? decoder_head_parts(limits, width, pixels)
                                                   : decoder_recompute_parts(limits, width, pixels);
  return {parts, limits, op.shape, pixels, head_parts, op.activations};
}

Status run_recompute(const Call& call, const PixelDecoderBackward& op, const DecoderChunks& chunks,
                     const DecoderChunk& chunk, bool sums) {
  DecoderRecompute recompute;
  recompute.packed = chunks.packed();
  recompute.shape = op.shape;
  recompute.image = chunk.image;
  recompute.grad_velocity = Image(op.grad_velocity);
  recompute.cond = chunk.cond;
  recompute.first_pixel = chunk.first_pixel;
  recompute.pixels = chunk.pixels;
  recompute.eps = op.eps;
  recompute.h_tiles = chunks.h_tiles(0, chunk.pixels);
  recompute.s_tiles = chunks.s_tiles();
  recompute.grad_h_tiles = chunks.grad_h_tiles(chunk.pixels);
  recompute.partials = sums ? chunks.head_partials() : nullptr;
  recompute.accumulate = chunk.accumulate;
  const DecoderExtension extension = {rows_of(op.query, op.shape, chunk.first_pixel), op.head_norm != 0};
  return decoder_recompute(call, op.cond.dtype, recompute, extension);
}

Status run_chunk(const Call& call, const PixelDecoderBackward& op, const DecoderChunks& chunks,
                 const DecoderChunk& chunk) {
  const bool sums = wants_gradients(op.grad_weights);
  const DType operand = op.cond.dtype;
  const Status status = op.activations != nullptr ? chunks.head(call, operand, op.eps, op.head_norm != 0, chunk,
                                                                Image(op.grad_velocity), sums)
                                                  : run_recompute(call, op, chunks, chunk, sums);
  return status.ok() ? chunks.backward(call, operand, op.eps, chunk, sums) : status;
}

}  // namespace

int64_t pixel_decoder_backward_workspace(const DeviceLimits& limits, const PixelDecoderBackward& op) {
  if (op.shape.pixels() == 0) return 0;
  WorkspaceParts parts;
  take_chunks(parts, limits, op);
  return parts.bytes();
}

Status pixel_decoder_backward(const Call& call, const PixelDecoderBackward& op) {
  const DecoderShape& shape = op.shape;
  if (call.workspace_bytes < pixel_decoder_backward_workspace(call.limits, op))
    return {kWorkspaceTooSmall, "pixel_decoder_backward"};
  if (shape.pixels() >= kPixelLimit) return {kTooManyPixels, "pixel_decoder_backward"};
  if (shape.pixels() == 0) return {};
  WorkspaceParts parts(call.workspace);
  const DecoderChunks chunks = take_chunks(parts, call.limits, op);
  Status status = pack_decoder(call, op.cond.dtype, chunks.packed(), op.weights, shape);
  const int64_t step = largest_chunk(op);
  for (int64_t pixel = 0; status.ok() && pixel < shape.pixels(); pixel += step) {
    DecoderChunk chunk;
    chunk.shape = shape;
    chunk.image = Image(op.image);
    chunk.grad_image = Image(op.grad_image);
    chunk.cond = rows_of(op.cond, shape, pixel);
    chunk.grad_cond = contiguous_rows(op.grad_cond, shape, pixel);
    chunk.grad_query = contiguous_rows(op.grad_query, shape, pixel);
    chunk.first_pixel = pixel;
    chunk.pixels = std::min(step, shape.pixels() - pixel);
    chunk.accumulate = pixel > 0;
    status = run_chunk(call, op, chunks, chunk);
  }
  if (status.ok() && wants_gradients(op.grad_weights))
    status = chunks.sum_weights(call, shape, op.weights, op.grad_weights);
  return status;
}

}  // namespace deco::cuda
