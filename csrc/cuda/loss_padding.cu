// Slow path of the flow-matching loss, for images whose size is not a multiple of 8, whose rows are not contiguous and
// aligned to 16 bytes, or whose dtypes ImagePair does not support.
//
// write_difference writes R·(pred - target) in float32, contiguous; R is the reflection padding of the bottom and right
// edges. fold_gradients applies Rᵀ to its gradient and adds the gradient of the pixel loss. Persistent grids; a thread
// owns one pixel at a time and adds in a fixed order. Per pixel: write_difference reads 6 values and writes 12 bytes;
// fold_gradients reads 6 values and 12 bytes and writes 3 values (6 with the gradient of target).
#include "cuda/loss_plan.h"

namespace deco::cuda {

namespace {

// 1,536 threads, the most on a multiprocessor of compute capability 8.6, 8.9 or 12.0.
constexpr int kThreads = 256, kBlocksPerMultiprocessor = 6;

// Indices of the pixels of a batch of planes with fewer than 2^31 pixels in total.
struct PixelGrid {
  Divider width, height;
  uint32_t pixels = 0;

  PixelGrid() = default;
  PixelGrid(int64_t images, int64_t rows, int64_t columns)
      : width(static_cast<uint32_t>(columns)),
        height(static_cast<uint32_t>(rows)),
        pixels(static_cast<uint32_t>(images * rows * columns)) {}

  DECO_DEVICE PixelPlace place(uint32_t pixel) const {
    const uint32_t row = width.quotient(pixel), image = height.quotient(row);
    return {image, row - image * height.divisor, pixel - row * width.divisor};
  }
};

DECO_DEVICE float difference(const Image& pred, const Image& target, const PixelPlace& place, int channel) {
  return load_float(pred.at(place) + channel * pred.stride_c, pred.dtype) -
         load_float(target.at(place) + channel * target.stride_c, target.dtype);
}

// ---- R --------------------------------------------------------------------------------------------------------------

struct DifferenceParams {
  Image pred, target, difference;  // difference: written
  PixelGrid grid;                  // of the padded images
  int64_t batch = 0, height = 0, width = 0;

  template <class V>
  void visit(V& buffers) const {
    pred.visit(buffers, false, batch, kColors, height, width);
    target.visit(buffers, false, batch, kColors, height, width);
    difference.visit(buffers, true, batch, kColors, grid.height.divisor, grid.width.divisor);
  }
};

DECO_KERNEL(kThreads, kBlocksPerMultiprocessor, difference_kernel, const DifferenceParams p) {
  const auto height = static_cast<uint32_t>(p.height), width = static_cast<uint32_t>(p.width);
  for (uint32_t pixel = block() * kThreads + thread(); pixel < p.grid.pixels; pixel += block_count() * kThreads) {
    const PixelPlace padded = p.grid.place(pixel);
    const PixelPlace source = {padded.image, padded.y < height ? padded.y : 2 * (height - 1) - padded.y,
                               padded.x < width ? padded.x : 2 * (width - 1) - padded.x};
    char* written = p.difference.at(padded);
    for (int c = 0; c < kColors; ++c)
      store(reinterpret_cast<float*>(written + c * p.difference.stride_c), difference(p.pred, p.target, source, c));
  }
}

// ---- Rᵀ -------------------------------------------------------------------------------------------------------------

struct FoldParams {
  Image pred, target;
  Image grad_padded;             // gradient of the padded difference, float32
  Image grad_pred, grad_target;  // written unless null
  PixelGrid grid;                // of the images
  Array sample_weight;
  LossGradients gradients;
  int64_t batch = 0, padded_height = 0, padded_width = 0;

  template <class V>
  void visit(V& buffers) const {
    const int64_t height = grid.height.divisor, width = grid.width.divisor;
    pred.visit(buffers, false, batch, kColors, height, width);
    target.visit(buffers, false, batch, kColors, height, width);
    grad_padded.visit(buffers, false, batch, kColors, padded_height, padded_width);
    grad_pred.visit(buffers, true, batch, kColors, height, width);
    grad_target.visit(buffers, true, batch, kColors, height, width);
    visit_array(buffers, false, sample_weight, batch);
    gradients.visit(buffers);
  }
};

DECO_DEVICE void store_element(const Image& image, const PixelPlace& place, int channel, float value) {
  if (image.data != nullptr) store_float(Array{image.at(place) + channel * image.stride_c, image.dtype}, 0, value);
}

DECO_KERNEL(kThreads, kBlocksPerMultiprocessor, fold_kernel, const FoldParams p) {
  const float pixel_factor = p.gradients.factors().pixel;
  const uint32_t height = p.grid.height.divisor, width = p.grid.width.divisor;
  for (uint32_t pixel = block() * kThreads + thread(); pixel < p.grid.pixels; pixel += block_count() * kThreads) {
    const PixelPlace place = p.grid.place(pixel);
    const float factor = pixel_factor * weight_of(p.sample_weight, place.image);
    // Row and column of the padding that repeat this pixel, if any.
    const uint32_t mirror_y = 2 * (height - 1) - place.y, mirror_x = 2 * (width - 1) - place.x;
    const bool row_repeated = mirror_y >= height && mirror_y < p.padded_height;
    const bool column_repeated = mirror_x >= width && mirror_x < p.padded_width;
    for (int c = 0; c < kColors; ++c) {
      const auto grad_padded = [&](uint32_t y, uint32_t x) {
        const char* address = p.grad_padded.at({place.image, y, x}) + c * p.grad_padded.stride_c;
        return load(reinterpret_cast<const float*>(address));
      };
      float grad = factor * difference(p.pred, p.target, place, c);
      grad += grad_padded(place.y, place.x);
      if (row_repeated) grad += grad_padded(mirror_y, place.x);
      if (column_repeated) grad += grad_padded(place.y, mirror_x);
      if (row_repeated && column_repeated) grad += grad_padded(mirror_y, mirror_x);
      store_element(p.grad_pred, place, c, grad);
      store_element(p.grad_target, place, c, -grad);
    }
  }
}

LaunchSize pixel_launch(const Call& call, const PixelGrid& grid) {
  return {grid_blocks(grid.pixels, kThreads, call.limits, kBlocksPerMultiprocessor), kThreads, 0};
}

}  // namespace

Status write_difference(const Call& call, const LossPlan& plan, float* difference) {
  DifferenceParams p;
  p.pred = Image(plan.inputs.pred);
  p.target = Image(plan.inputs.target);
  p.difference = plan.padded_difference(difference).image;
  p.grid = PixelGrid(plan.inputs.batch, plan.padded_height, plan.padded_width);
  p.batch = plan.inputs.batch;
  p.height = plan.inputs.height;
  p.width = plan.inputs.width;
  return launch("flow_matching_loss_difference", difference_kernel, pixel_launch(call, p.grid), call.stream, p);
}

Status fold_gradients(const Call& call, const LossPlan& plan, const FlowMatchingLossBackward& op, float* difference) {
  const FlowMatchingLossInputs& inputs = plan.inputs;
  FoldParams p;
  p.pred = Image(inputs.pred);
  p.target = Image(inputs.target);
  p.grad_padded = plan.padded_difference(difference).image;
  p.grad_pred = Image(LossPlan::contiguous_image(op.grad_pred, inputs.height, inputs.width));
  p.grad_target = Image(LossPlan::contiguous_image(op.grad_target, inputs.height, inputs.width));
  p.grid = PixelGrid(inputs.batch, inputs.height, inputs.width);
  p.sample_weight = inputs.sample_weight;
  p.gradients = LossGradients(plan, op);
  p.batch = inputs.batch;
  p.padded_height = plan.padded_height;
  p.padded_width = plan.padded_width;
  return launch("flow_matching_loss_fold", fold_kernel, pixel_launch(call, p.grid), call.stream, p);
}

}  // namespace deco::cuda
