// Flow-matching loss of DeCo (arXiv 2511.19365, section 3) and its gradient, each in one pass over both images, or both
// in one pass.
//
//   d         = pred - target                                    [B, 3, H, W]
//   pixel     = 1/B sum_b w_b mean(d_b^2)
//   frequency = 1/B sum_b w_b mean(W (F R M d_b)^2)              mean over the padded size
//   gradient  = a_b d_b + f_b M' R' F' (W F R M d_b)
//   a_b = 2 w_b g_pixel / (3 B H W), and f_b likewise from g_frequency over the padded size
//
// M: RGB -> YCbCr, R: reflection that pads the right and bottom edges to multiples of 8, F: orthonormal 8x8 DCT-II,
// w: sample_weight, W: frequency_weight, ': transpose. The normalization of F is folded into W.
//
// A tile is a strip of 8 image rows by kTileWidth columns. It is read into float planes in the caches (d and its
// YCbCr), transformed there in place, and written once. A thread owns a contiguous range of tiles. Tiles are wide so
// that memory is read in long sequential runs; the next tile is prefetched during the transform. Reflected rows repeat
// rows of the last two strips, so the gradient of both needs the last strip's transform; the strip above the last
// recomputes it instead of waiting for it.
//
// Per pixel: the forward reads 6 values and takes 40 additions, multiplications and multiply-adds; the backward reads 6
// values, writes 3 (6 with the target's gradient) and takes 63; both in one pass read 6, write 3 and take 72.
// Deterministic for a given thread count: each thread adds its tiles in order, in double, and the threads' sums are
// added in order. The gradients of the images do not depend on the thread count.
#include "deco/flow_matching_loss.h"

#include "cpu/kernel_table.h"
#include "cpu/loss_sums.h"
#include "cpu/loss_transform.h"
#include "cpu/parallel.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

// ---- writing ------------------------------------------------------------------------------------------------------

// Row r of the gradient, sign * (a rgb + M' ycbcr), to three channels of whole vectors. kStreaming: streaming stores to
// aligned float32.
template <DType kDType, bool kNegative, bool kStreaming>
void write_row(const Planes& rgb, const Planes& ycbcr, int r, int columns, float pixel_factor, void* const (&to)[3]) {
  const VecF a = broadcast(pixel_factor);
  for (int x = 0; x < columns; x += kLanes) {
    VecF color[3];
    transposed_color(load(&ycbcr.channel[0][r][x]), load(&ycbcr.channel[1][r][x]), load(&ycbcr.channel[2][r][x]),
                     color);
    unroll<3>([&](auto c) DECO_INLINE_LAMBDA {
      VecF value = fma(a, load(&rgb.channel[c][r][x]), color[c]);
      if constexpr (kNegative) value = broadcast(0.0f) - value;
      if constexpr (kStreaming) {
        store_streaming(static_cast<float*>(to[c]) + x, value);
      } else {
        store_as<kDType>(to[c], x, value);
      }
    });
  }
}

// Copies bytes, with streaming stores where the destination is aligned to a vector.
void copy_streaming(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kVectorBytes = kLanes * sizeof(float);
  int64_t head = -reinterpret_cast<intptr_t>(to) & (kVectorBytes - 1);
  if (head > bytes) head = bytes;
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes)
    store_streaming(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  std::memcpy(to + i, from + i, bytes - i);
}

// Writes the gradient of one of the two images; they differ in sign and dtype.
template <bool kNegative>
class GradientWriter {
 public:
  GradientWriter(const Array& gradient, const FlowMatchingLossInputs& inputs)
      : gradient_(gradient), height_(inputs.height), width_(inputs.width) {
    streaming_ = inputs.batch * 3 * height_ * width_ * size_of(gradient.dtype) >= kStreamingBytes;
    with_dtype(gradient.dtype, [&](auto dtype) { write_row_ = write_row<dtype, kNegative, false>; });
  }

  bool wanted() const { return gradient_.data != nullptr; }

  void write(const Planes& rgb, const Planes& ycbcr, const Tile& tile, float pixel_factor) const {
    constexpr int kVectorBytes = kLanes * sizeof(float);
    alignas(64) float staged[3][kPitch];
    const int columns = tile.vector_columns();
    for (int r = 0; r < tile.rows; ++r) {
      void* row[3];
      bool aligned = true;
      for (int c = 0; c < 3; ++c) {
        const int64_t offset = ((tile.sample * 3 + c) * height_ + tile.y + r) * width_ + tile.x;
        row[c] = static_cast<char*>(gradient_.data) + offset * size_of(gradient_.dtype);
        aligned = aligned && reinterpret_cast<intptr_t>(row[c]) % kVectorBytes == 0;
      }
      const bool whole_vectors = tile.columns == columns;
      if (whole_vectors && !streaming_) {
        write_row_(rgb, ycbcr, r, columns, pixel_factor, row);
      } else if (whole_vectors && aligned && gradient_.dtype == DType::kFloat32) {
        write_row<DType::kFloat32, kNegative, true>(rgb, ycbcr, r, columns, pixel_factor, row);
      } else {
        void* const staged_row[3] = {staged[0], staged[1], staged[2]};
        write_row_(rgb, ycbcr, r, columns, pixel_factor, staged_row);
        for (int c = 0; c < 3; ++c) copy(row[c], staged[c], tile.columns * size_of(gradient_.dtype));
      }
    }
  }

 private:
  void copy(void* to, const void* from, int64_t bytes) const {
    if (streaming_) {
      copy_streaming(static_cast<char*>(to), static_cast<const char*>(from), bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }

  Array gradient_;
  int64_t height_, width_;
  bool streaming_;
  void (*write_row_)(const Planes&, const Planes&, int, int, float, void* const (&)[3]);
};

Normalization normalization_of(const FlowMatchingLossInputs& inputs) {
  const int64_t padded = round_up(inputs.height, kBlock) * round_up(inputs.width, kBlock);
  return Normalization(inputs.batch, inputs.height * inputs.width, padded);
}

// ---- losses -------------------------------------------------------------------------------------------------------

void write_losses_of(const FlowMatchingLossForward& call, const SampleSums* sums, int parts) {
  const FlowMatchingLossInputs& inputs = call.inputs;
  write_losses(sums, inputs.batch, parts, inputs.sample_weight, normalization_of(inputs), call.frequency_scale,
               call.total, call.pixel, call.frequency);
}

void losses(const FlowMatchingLossForward& call) {
  const FlowMatchingLossInputs& inputs = call.inputs;
  const Tiling tiling(inputs);
  const ImagePair<Difference::kSquares> images(inputs, tiling);
  const int parts = part_count(tiling.count(), inputs.threads);
  SampleSums* const sums = reinterpret_cast<SampleSums*>(inputs.workspace);

  parallel_for(parts, [&](int part) {
    CoefficientTable weights;
    fill_weights(inputs.frequency_weight, 1.0f, weights);
    Planes rgb, ycbcr;
    const Range range = share_of(tiling.count(), parts, part);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Tile tile = tiling[i];
      SampleSums& tile_sums = sums[part * inputs.batch + tile.sample];
      tile_sums.pixel += images.read(tile, rgb, ycbcr);
      reflect_columns(tile, ycbcr);
      const Tile next = tiling[i + 1 < range.end ? i + 1 : i];
      const auto prefetch = [&](int step, int steps) DECO_INLINE_LAMBDA { images.prefetch(next, step, steps); };
      tile_sums.frequency += weighted_energy(weights, tile, ycbcr, prefetch);
    }
  });
  write_losses_of(call, sums, parts);
}

// ---- gradients ----------------------------------------------------------------------------------------------------

// State shared by the threads. kLosses: also the sums of the losses.
template <bool kLosses>
struct GradientPlan {
  const FlowMatchingLossBackward& call;
  const FlowMatchingLossInputs& inputs;
  Tiling tiling;
  ImagePair<kLosses ? Difference::kBoth : Difference::kValues> images;
  GradientWriter<false> pred_writer;
  GradientWriter<true> target_writer;
  double pixel_factor, frequency_factor;  // incoming gradients of the two losses times their normalization
  int parts;
  SampleSums* sample_sums;  // [parts][B]
  double* frequency_sums;   // [parts][3, 8, 8]

  explicit GradientPlan(const FlowMatchingLossBackward& c)
      : call(c),
        inputs(c.inputs),
        tiling(inputs),
        images(inputs, tiling),
        pred_writer(c.grad_pred, inputs),
        target_writer(c.grad_target, inputs),
        pixel_factor(c.grad_pixel * normalization_of(inputs).pixel),
        frequency_factor(c.grad_frequency * normalization_of(inputs).frequency),
        parts(part_count(tiling.count(), inputs.threads)),
        sample_sums(reinterpret_cast<SampleSums*>(inputs.workspace)),
        frequency_sums(inputs.workspace + 2 * inputs.batch * parts) {}

  bool wants_images() const { return pred_writer.wanted() || target_writer.wanted(); }
  bool wants_weights() const { return call.grad_frequency_weight != nullptr || call.grad_sample_weight != nullptr; }
};

// Processes the tiles of one part.
template <bool kLosses>
class GradientWorker {
 public:
  GradientWorker(const GradientPlan<kLosses>& plan, int part) : plan_(plan), part_(part) {
    if constexpr (kLosses) fill_weights(plan.inputs.frequency_weight, 1.0f, unit_weights_);
  }

  // `next` is the tile to prefetch.
  void process(const Tile& tile, const Tile& next) {
    const double weight = weight_of(plan_.inputs.sample_weight, tile.sample);
    const float squares = plan_.images.read(tile, rgb_, ycbcr_);
    reflect_columns(tile, ycbcr_);
    if (plan_.call.grad_pixel == 0.0) clear(tile, rgb_);  // 0 times an infinite difference would be NaN
    if (plan_.wants_weights()) add_sums(tile, weight);
    if (!plan_.wants_images()) return;

    if (tile.sample != weighted_sample_) {
      fill_weights(plan_.inputs.frequency_weight, static_cast<float>(2.0 * weight * plan_.frequency_factor), weights_);
      weighted_sample_ = tile.sample;
    }
    const auto prefetch = [&](int step, int steps) DECO_INLINE_LAMBDA { plan_.images.prefetch(next, step, steps); };
    if constexpr (kLosses) {
      SampleSums& sums = sample_sums(tile);
      sums.pixel += squares;
      sums.frequency += weighted_energy_and_apply(unit_weights_, weights_, tile, ycbcr_, prefetch);
    } else {
      apply_weights(weights_, tile, ycbcr_, prefetch);
    }
    fold_columns(tile, ycbcr_);
    add_reflected_rows(tile);
    const float pixel_factor = static_cast<float>(2.0 * weight * plan_.pixel_factor);
    if (plan_.pred_writer.wanted()) plan_.pred_writer.write(rgb_, ycbcr_, tile, pixel_factor);
    if (plan_.target_writer.wanted()) plan_.target_writer.write(rgb_, ycbcr_, tile, pixel_factor);
  }

 private:
  SampleSums& sample_sums(const Tile& tile) const {
    return plan_.sample_sums[part_ * plan_.inputs.batch + tile.sample];
  }

  // For the gradients of the weights: sums of d^2 and W (F R M d)^2 per sample, and of (F R M d)^2 per frequency.
  void add_sums(const Tile& tile, double weight) {
    SampleSums& sums = sample_sums(tile);
    for (const auto& channel : rgb_.channel)
      for (int r = 0; r < tile.rows; ++r)
        for (int x = 0; x < tile.columns; ++x) sums.pixel += double{channel[r][x]} * channel[r][x];
    double squares[3 * kFrequencies];
    sum_squares(tile, ycbcr_, squares);
    double* const frequency_sums = plan_.frequency_sums + part_ * 3 * kFrequencies;
    for (int k = 0; k < 3 * kFrequencies; ++k) {
      sums.frequency += plan_.inputs.frequency_weight[k] * squares[k];
      frequency_sums[k] += weight * squares[k];
    }
  }

  // R' along the rows.
  void add_reflected_rows(const Tile& tile) {
    const Tiling& tiling = plan_.tiling;
    if (!tiling.has_reflected_rows() || tile.y + kBlock < tiling.last_strip_y()) return;
    const Tile last = tiling.in_last_strip(tile);
    if (last.y == tile.y) return fold_rows(tiling, last, ycbcr_, tile, ycbcr_);
    Planes rgb, ycbcr;
    plan_.images.read(last, rgb, ycbcr);
    reflect_columns(last, ycbcr);
    apply_weights(weights_, last, ycbcr, NoPrefetch{});
    fold_columns(last, ycbcr);
    fold_rows(tiling, last, ycbcr, tile, ycbcr_);
  }

  const GradientPlan<kLosses>& plan_;
  int part_;
  int64_t weighted_sample_ = -1;  // sample whose factor is in weights_
  CoefficientTable weights_, unit_weights_;
  Planes rgb_, ycbcr_;  // d, and R M d, overwritten by f R' F' W F R M d
};

template <bool kLosses>
void write_image_gradients(const GradientPlan<kLosses>& plan) {
  parallel_for(plan.parts, [&](int part) {
    GradientWorker<kLosses> worker(plan, part);
    const Range range = share_of(plan.tiling.count(), plan.parts, part);
    for (int64_t i = range.begin; i < range.end; ++i)
      worker.process(plan.tiling[i], plan.tiling[i + 1 < range.end ? i + 1 : i]);
  });
}

void losses_and_gradient(const FlowMatchingLossForward& call) {
  FlowMatchingLossBackward gradient;
  gradient.inputs = call.inputs;
  gradient.grad_pixel = call.grad_pixel;
  gradient.grad_frequency = call.grad_frequency;
  gradient.grad_pred = call.grad_pred;
  const GradientPlan<true> plan(gradient);
  write_image_gradients(plan);
  write_losses_of(call, plan.sample_sums, plan.parts);
}

}  // namespace

void flow_matching_loss_forward(const FlowMatchingLossForward& call) {
  call.grad_pred.data == nullptr ? losses(call) : losses_and_gradient(call);
}

void flow_matching_loss_backward(const FlowMatchingLossBackward& call) {
  const GradientPlan<false> plan(call);
  write_image_gradients(plan);

  write_grad_sample_weight(plan.sample_sums, call.inputs.batch, plan.parts, plan.pixel_factor, plan.frequency_factor,
                           call.grad_sample_weight);
  write_grad_frequency_weight(plan.frequency_sums, 3 * kFrequencies, plan.parts, plan.frequency_factor,
                              call.grad_frequency_weight);
}

}  // namespace deco::cpu::DECO_CPU_ISA
