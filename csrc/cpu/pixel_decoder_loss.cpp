// Decoder, flow-matching loss and the gradients of both in one pass (DeCo, arXiv 2511.19365, section 3).
//
// A tile is one 8x8 block of pixels, which holds all that the gradient of its loss needs: forward, loss, gradient of the
// velocity and backward of a tile run one after the other (decoder_training.h, block_loss.h). Nothing is recomputed, and
// only the results are written. Without gradients a tile runs only the forward and the loss.
//
// Each part (thread) owns a contiguous share of the tiles and adds the losses and the weights' gradients of its tiles,
// in order, to its own sums; the sums of the parts are added in order at the end. Bitwise reproducible for a given
// number of threads. Per pixel with gradients: 3 (N 5 D^2 + 2 C D) multiply-adds, and for the loss about 100 operations.
// Scratch memory per thread at D = 32, N = 3: about 0.4 MB.
#include "deco/pixel_decoder_loss.h"

#include "cpu/block_loss.h"
#include "cpu/decoder_training.h"
#include "cpu/kernel_table.h"
#include "cpu/loss_sums.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int T = kBlockPixels, kColors = 3;

template <class Operand, int D>
class OnePass {
 public:
  explicit OnePass(const PixelDecoderLoss& call)
      : call_(call),
        order_{call.shape.patch_size},
        grid_(call.shape),
        parts_(part_count(grid_.count(), call.threads)),
        normalization_(call.shape.batch, call.shape.height * call.shape.width, call.shape.height * call.shape.width),
        training_(call.shape, order_, parts_) {}

  void run() {
    with_scratch([&](Arena& arena) { lay_out(arena); });
    parallel_matmuls<Operand, D>(parts_, [&](int part) { run_part(part); });

    const double frequency_factor = call_.frequency_scale * normalization_.frequency;
    write_losses(sums_, call_.shape.batch, parts_, call_.sample_weight, normalization_, call_.frequency_scale,
                 call_.total, call_.pixel, call_.frequency);
    write_grad_sample_weight(sums_, call_.shape.batch, parts_, normalization_.pixel, frequency_factor,
                             call_.grad_sample_weight);
    write_grad_frequency_weight(frequency_sums_, 3 * kFrequencies, parts_, frequency_factor,
                                call_.grad_frequency_weight);
    if (call_.backward) training_.write_weight_gradients(call_.grad_weights);
  }

 private:
  void lay_out(Arena& arena) {
    const DType activation = call_.cond.dtype;
    if (call_.backward) {
      training_.lay_out(arena, call_.weights, call_.head_norm, call_.eps, activation, call_.grad_cond.data != nullptr,
                        call_.grad_weights);
    } else {
      take_decoder_weights<Operand, D, T>(arena, call_.weights, call_.shape, call_.head_norm, call_.eps, activation,
                                          order_, weights_);
      tiles_ = arena.take<DecoderTile<Operand, D, T>>(parts_);
    }
    sums_ = arena.take<SampleSums>(parts_ * call_.shape.batch);
    frequency_sums_ = arena.take<double>(parts_ * 3 * kFrequencies);
  }

  void run_part(int part) {
    const int64_t batch = call_.shape.batch;
    std::memset(sums_ + part * batch, 0, batch * sizeof(SampleSums));
    std::memset(frequency_sums_ + part * 3 * kFrequencies, 0, 3 * kFrequencies * sizeof(double));
    if (call_.backward) training_.clear(part);
    BlockLoss loss(call_.frequency_weight);
    const Range share = share_of(grid_.count(), parts_, part);
    for (int64_t t = share.begin; t < share.end; ++t) {
      const PixelBlock block = grid_[t];
      if (t + 1 < share.end) prefetch(grid_[t + 1]);
      if (call_.backward) {
        with_gradients(part, block, loss);
      } else {
        losses_only(part, block, loss);
      }
    }
  }

  // Always inlined (rows.h).
  DECO_INLINE void prefetch(const PixelBlock& block) const {
    const char* rows[T];
    for (const PixelRows& source : {call_.cond, call_.query}) {
      if (source.data == nullptr) continue;
      row_addresses<const char*>(source, block, order_, rows);
      prefetch_rows<D>(source.dtype, rows, 0, 1);
    }
  }

  // Sets the addresses of a block's rows.
  auto addresses_of(const PixelBlock& block) const {
    return [&block, this](const PixelRows& rows, const char*(&pointers)[T]) {
      row_addresses<const char*>(rows, block, order_, pointers);
    };
  }

  void losses_only(int part, const PixelBlock& block, BlockLoss& loss) {
    DecoderTile<Operand, D, T>& tile = tiles_[part];
    const auto addresses = addresses_of(block);
    const char* rows[T];
    addresses(call_.cond, rows);
    load_silu_cond<Operand, D, T>(call_.cond.dtype, rows, T, tile.silu_cond);
    gather_block(call_.image, block, kColors, tile.rgb);
    const auto* table = reinterpret_cast<const float (*)[T]>(weights_.table + block.index * D * T);
    const auto* panel = with_query<D, T>(call_.query, table, T, addresses, tile.panel);
    forward_tile<Operand, D, T>(weights_, panel, T, tile);
    add_losses(part, block, tile.velocity, loss);
  }

  void with_gradients(int part, const PixelBlock& block, BlockLoss& loss) {
    TrainingTile<Operand, D, T>& tile = training_.tile(part);
    const DecoderWeights<Operand, T>& weights = training_.weights();
    gather_block(call_.image, block, kColors, tile.rgb);
    training_.forward(part, block.index, call_.cond, call_.query, addresses_of(block), T);
    const auto normalized = [&](int d, int p) DECO_INLINE_LAMBDA { return load(&tile.normalized[d][p]); };
    alignas(64) float velocity[kColors][T];
    head_matmul<D, T>(kColors, weights.head_weight, weights.head_bias, T, normalized, velocity);

    const double weight = add_losses(part, block, velocity, loss);
    loss.write_gradient(static_cast<float>(2.0 * weight * normalization_.pixel),
                        static_cast<float>(2.0 * weight * normalization_.frequency * call_.frequency_scale),
                        tile.grad_velocity);
    training_.backward(part, block.index, T);
    write_gradients(block, tile);
  }

  // Adds the losses of a block to the part's sums; returns the weight of its sample.
  double add_losses(int part, const PixelBlock& block, const float (*velocity)[T], BlockLoss& loss) {
    alignas(64) float target[kColors][T];
    gather_block(call_.target, block, kColors, target);
    const BlockLoss::Sums sums = loss.add(velocity, target);
    SampleSums& sample = sums_[part * call_.shape.batch + block.sample];
    sample.pixel += sums.pixel;
    sample.frequency += sums.frequency;
    const double weight = weight_of(call_.sample_weight, block.sample);
    if (call_.grad_frequency_weight != nullptr) loss.add_squares(weight, frequency_sums_ + part * 3 * kFrequencies);
    return weight;
  }

  void write_gradients(const PixelBlock& block, TrainingTile<Operand, D, T>& tile) {
    if (call_.grad_image.data != nullptr) scatter_block(call_.grad_image, block, kColors, tile.grad_rgb);
    write_rows(call_.grad_cond, block, tile.block.grad_silu_cond);
    write_rows(call_.grad_query, block, tile.block.grad_h);
    if (call_.grad_target.data != nullptr) {
      for (int c = 0; c < kColors; ++c)
        for (int p = 0; p < T; p += kLanes)
          store(&tile.grad_velocity[c][p], broadcast(0.0f) - load(&tile.grad_velocity[c][p]));
      scatter_block(call_.grad_target, block, kColors, tile.grad_velocity);
    }
  }

  // Writes a block's rows, unless the data of `to` is null.
  void write_rows(const PixelRows& to, const PixelBlock& block, const float (*gradient)[T]) const {
    if (to.data == nullptr) return;
    char* rows[T];
    row_addresses<char*>(to, block, order_, rows);
    store_rows<FloatOperand, D, T>(to.dtype, gradient, T, rows, row_writes<D>(to, call_.shape.pixels()));
  }

  const PixelDecoderLoss& call_;
  const BlockOrder order_;
  const BlockGrid grid_;
  const int parts_;
  const Normalization normalization_;
  DecoderTraining<Operand, D, T, BlockOrder> training_;  // with gradients
  DecoderWeights<Operand, T> weights_;                   // without gradients
  DecoderTile<Operand, D, T>* tiles_ = nullptr;          // one per part, without gradients
  SampleSums* sums_ = nullptr;                           // [parts][B]
  double* frequency_sums_ = nullptr;                     // [parts][3, 8, 8]
};

}  // namespace

void pixel_decoder_loss(const PixelDecoderLoss& call) {
  with_operand_and_width(call.cond.dtype, call.shape.decoder_width,
                         [&](auto operand, auto width) { OnePass<decltype(operand), width.value>(call).run(); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
