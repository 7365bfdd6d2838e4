// pixel_decoder_loss in one pass, with the gradients of total. A chunk is whole images or whole rows of patches of one
// image, so it holds whole 8x8 blocks of the loss. For one chunk at a time, with values between the kernels in a
// workspace:
//   1. pixel_decoder.cu: the forward, which keeps the inputs of the decoder blocks and of the head
//   2. flow_matching_loss_backward.cu: the sums of the losses, and the gradient of the velocity in its place
//   3. decoder_head.cu, decoder_chunks.cu: the backward of the head, of the decoder blocks in reverse order, and of the
//      embedding
// The losses and the gradients of the weights come from sums over the chunks, which are added in a fixed order. Without
// gradients of the decoder's inputs only the velocity and what the loss needs are computed.
#include <optional>

#include "cuda/decoder_chunks.h"
#include "cuda/loss_plan.h"
#include "deco/cuda/pixel_decoder_loss.h"

namespace deco::cuda {

namespace {

// Calls run(first image, first row, sizes of the chunk) for one chunk after the other until it fails.
template <class Run>
Status for_each_chunk(const DecoderShape& shape, const PixelDecoderLoss& op, Run&& run) {
  Status status;
  for (int64_t image = 0; image < shape.batch; image += op.chunk_images)
    for (int64_t row = 0; row < shape.height && status.ok(); row += op.chunk_rows) {
      DecoderShape sizes = shape;
      sizes.batch = std::min(op.chunk_images, shape.batch - image);
      sizes.height = std::min(op.chunk_rows, shape.height - row);
      status = run(image, row, sizes);
    }
  return status;
}

// The part of an image that begins at this image of the batch and row.
ImageArray part_of(ImageArray image, int64_t first, int64_t row) {
  if (image.data == nullptr) return image;
  const int64_t elements = first * image.stride_b + row * image.stride_y;
  image.data = static_cast<char*>(image.data) + elements * size_of(image.dtype);
  return image;
}

class OnePass {
 public:
  OnePass(const DeviceLimits& limits, const PixelDecoderLoss& op, void* workspace)
      : op_(op), batch_(inputs_of(0, 0, op.shape)), batch_plan_(batch_) {
    DecoderShape largest = op.shape;
    largest.batch = op.chunk_images;
    largest.height = op.chunk_rows;
    WorkspaceParts parts(workspace);
    if (wants_decoder())
      backward_.emplace(parts, limits, largest, largest.pixels(),
                        decoder_head_parts(limits, op.shape.decoder_width, largest.pixels()));
    else
      packed_ = PackedWeights::take(parts, op.shape.depth, op.shape.decoder_width, kBlockMatrices,
                                    op.shape.pixels_per_token());
    velocity_ = parts.take<uint16_t>(kColors * largest.pixels());
    DecoderShape one = op.shape;
    one.batch = 1;
    for_each_chunk(one, op, [&](int64_t, int64_t, const DecoderShape& sizes) {
      groups_per_image_ += BlockGrid(1, sizes.height, sizes.width).groups;
      return Status();
    });
    sums_ = parts.take<Float2>(op.shape.batch * groups_per_image_);
    if (wants_frequency_weight()) {
      difference_ = parts.take<float>(kColors * largest.pixels());
      frequencies_ = parts.take<float>(int64_t{limits.multiprocessors} * kLossWarps * kColors * kSlots);
      frequency_sum_ = parts.take<float>(kColors * kSlots);
    }
    bytes_ = parts.bytes();
  }

  int64_t bytes() const { return bytes_; }

  Status run(const Call& call) {
    const DType operand = op_.cond.dtype;
    const LossGradients gradients(batch_plan_, op_.frequency_scale, op_.grad_total, 0.0f);
    Status status = pack_decoder(call, operand, packed(), op_.weights, op_.shape);
    Float2* sums = sums_;
    if (status.ok())
      status = for_each_chunk(op_.shape, op_, [&](int64_t image, int64_t row, const DecoderShape& sizes) {
        return run_chunk(call, image, row, sizes, gradients, sums);
      });
    const LossScalars losses = {op_.frequency_scale, op_.total, op_.pixel, op_.frequency};
    if (status.ok()) status = write_losses(call, batch_plan_, losses, sums_, groups_per_image_);
    if (status.ok() && wants_gradients(op_.grad_weights))
      status = backward_->sum_weights(call, op_.shape, op_.weights, op_.grad_weights);
    if (status.ok() && wants_frequency_weight())
      status = frequency_weight_gradient(call, gradients, frequencies_, frequency_parts_, frequency_sum_,
                                         op_.grad_frequency_weight);
    if (status.ok() && op_.grad_sample_weight.data != nullptr)
      status =
          sample_weight_gradient(call, gradients, sums_, op_.shape.batch, groups_per_image_, op_.grad_sample_weight);
    return status;
  }

 private:
  bool wants_decoder() const {
    return op_.grad_image.data != nullptr || op_.grad_cond.data != nullptr || op_.grad_query.data != nullptr ||
           wants_gradients(op_.grad_weights);
  }
  bool wants_frequency_weight() const { return op_.grad_frequency_weight.data != nullptr; }
  const PackedWeights& packed() const { return backward_ ? backward_->packed() : packed_; }

  // Inputs of the loss of these images, with the velocity in the workspace.
  FlowMatchingLossInputs inputs_of(int64_t image, int64_t row, const DecoderShape& sizes) const {
    FlowMatchingLossInputs inputs;
    inputs.batch = sizes.batch;
    inputs.height = sizes.height;
    inputs.width = sizes.width;
    inputs.pred = LossPlan::contiguous_image({velocity_, op_.cond.dtype}, sizes.height, sizes.width);
    inputs.target = part_of(op_.target, image, row);
    inputs.frequency_weight = op_.frequency_weight;
    inputs.sample_weight = op_.sample_weight;
    if (inputs.sample_weight.data != nullptr)
      inputs.sample_weight.data =
          static_cast<char*>(inputs.sample_weight.data) + image * size_of(inputs.sample_weight.dtype);
    return inputs;
  }

  // Advances `sums` by the groups of the chunk.
  Status run_chunk(const Call& call, int64_t image, int64_t row, const DecoderShape& sizes,
                   const LossGradients& gradients, Float2*& sums) {
    const int64_t first_pixel = (image * op_.shape.height + row) * op_.shape.width;
    const bool accumulate = first_pixel > 0;
    const FlowMatchingLossInputs inputs = inputs_of(image, row, sizes);
    const LossPlan plan(inputs);
    const Image velocity(inputs.pred);

    DecoderForward forward;
    forward.packed = packed();
    forward.shape = sizes;
    forward.image = Image(part_of(op_.image, image, row));
    forward.velocity = velocity;
    forward.cond = rows_of(op_.cond, op_.shape, first_pixel);
    forward.eps = op_.eps;
    if (backward_) {
      forward.h_tiles = backward_->h_tiles(0, sizes.pixels());
      forward.s_tiles = backward_->s_tiles();
    }
    const DecoderExtension extension = {rows_of(op_.query, op_.shape, first_pixel), op_.head_norm != 0};
    Status status = decoder_forward(call, op_.cond.dtype, forward, extension);

    if (wants_frequency_weight()) {
      if (!accumulate) frequency_parts_ = frequency_parts(call, plan);
      if (status.ok()) status = write_difference(call, plan, difference_);
      if (status.ok()) status = sum_frequencies(call, plan, difference_, frequencies_, accumulate);
    }
    if (status.ok()) {
      const Image grad_target(part_of(op_.grad_target, image, row));
      if (backward_ || grad_target.data != nullptr)
        status = write_gradients(call, plan, gradients, backward_ ? velocity : Image(), grad_target, sums);
      else
        status = sum_groups(call, plan, nullptr, sums);
    }
    sums += plan.grid.groups;
    if (!backward_ || !status.ok()) return status;

    DecoderChunk chunk;
    chunk.shape = sizes;
    chunk.image = forward.image;
    chunk.grad_image = Image(part_of(op_.grad_image, image, row));
    chunk.cond = forward.cond;
    chunk.grad_cond = contiguous_rows(op_.grad_cond, sizes, first_pixel);
    chunk.grad_query = contiguous_rows(op_.grad_query, sizes, first_pixel);
    chunk.pixels = sizes.pixels();
    chunk.accumulate = accumulate;
    const bool with_weights = wants_gradients(op_.grad_weights);
    status = backward_->head(call, op_.cond.dtype, op_.eps, extension.rms, chunk, velocity, with_weights);
    return status.ok() ? backward_->backward(call, op_.cond.dtype, op_.eps, chunk, with_weights) : status;
  }

  const PixelDecoderLoss& op_;
  uint16_t* velocity_ = nullptr;  // of a chunk, [images, 3, rows, W]; then its gradient
  FlowMatchingLossInputs batch_;
  LossPlan batch_plan_;  // sizes and weights of the whole batch
  std::optional<DecoderChunks> backward_;
  PackedWeights packed_;    // without backward_
  Float2* sums_ = nullptr;  // [B][groups_per_image_]
  uint32_t groups_per_image_ = 0;
  float *difference_ = nullptr, *frequencies_ = nullptr, *frequency_sum_ = nullptr;
  int frequency_parts_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace

int64_t pixel_decoder_loss_workspace(const DeviceLimits& limits, const PixelDecoderLoss& op) {
  return op.shape.pixels() == 0 ? 0 : OnePass(limits, op, nullptr).bytes();
}

Status pixel_decoder_loss(const Call& call, const PixelDecoderLoss& op) {
  if (call.workspace_bytes < pixel_decoder_loss_workspace(call.limits, op))
    return {kWorkspaceTooSmall, "pixel_decoder_loss"};
  if (op.shape.pixels() >= kPixelLimit) return {kTooManyPixels, "pixel_decoder_loss"};
  if (op.shape.pixels() == 0) return {};
  return OnePass(call.limits, op, call.workspace).run(call);
}

}  // namespace deco::cuda
