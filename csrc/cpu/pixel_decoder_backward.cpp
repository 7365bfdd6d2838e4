// Backward of pixel_decoder (decoder_tile_backward.h). The forward saves only its inputs: each tile recomputes its
// forward, stores the intermediate results in scratch memory, and runs through the decoder blocks in reverse order.
//
// Each part (thread) owns a contiguous share of the tiles. It writes the gradients of the image and cond at their
// pixels and adds the weights' gradients of its tiles, in order, to its own sums; the sums of the parts are added in
// order at the end. Bitwise reproducible for a given number of threads. Scratch memory per thread at D = 32, N = 3:
// about 0.4 MB. Per pixel: 15 N D^2 multiply-adds, 5 N D^2 of them for the recomputed forward.
#include "cpu/decoder_training.h"
#include "cpu/kernel_table.h"
#include "cpu/rows.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

template <class Operand, int D, int T>
class Backward {
 public:
  explicit Backward(const PixelDecoderBackward& call)
      : call_(call),
        rows_(call.shape.pixels()),
        tiles_((rows_ + T - 1) / T),
        parts_(part_count(tiles_, call.threads)),
        training_(call.shape, RowOrder{call.shape.pixels_per_token()}, parts_) {}

  void run() {
    const auto lay_out = [&](Arena& arena) {
      training_.lay_out(arena, call_.weights, call_.head_norm, call_.eps, call_.cond.dtype,
                        call_.grad_cond.data != nullptr, call_.grad_weights);
    };
    with_scratch(lay_out);
    parallel_matmuls<Operand, D>(parts_, [&](int part) { run_part(part); });
    training_.write_weight_gradients(call_.grad_weights);
  }

 private:
  void run_part(int part) {
    training_.clear(part);
    const Range share = share_of(tiles_, parts_, part);
    for (int64_t t = share.begin; t < share.end; ++t) process(part, t);
  }

  void process(int part, int64_t t) {
    TrainingTile<Operand, D, T>& tile = training_.tile(part);
    const int64_t first = t * T;
    const int count = static_cast<int>(rows_ - first < T ? rows_ - first : T), pixels = whole_strips(count);
    const int panel = static_cast<int>(t % training_.weights().panels);
    const auto addresses = [&](const PixelRows& rows, const char*(&pointers)[T]) {
      row_addresses<T, const char*>(call_.shape, rows, first, count, pointers);
    };
    gather_pixels<T>(call_.shape, call_.image, first, count, tile.rgb);
    training_.forward(part, panel, call_.cond, call_.query, addresses, pixels);
    gather_pixels<T>(call_.shape, call_.grad_velocity, first, count, tile.grad_velocity);
    clear_missing<T>(call_.shape.channels, count, tile.grad_velocity);
    training_.backward(part, panel, pixels);
    if (call_.grad_image.data != nullptr) scatter_pixels<T>(call_.shape, call_.grad_image, first, count, tile.grad_rgb);
    write_rows(call_.grad_cond, first, count, tile.block.grad_silu_cond);
    write_rows(call_.grad_query, first, count, tile.block.grad_h);
  }

  // Writes a tile's rows, unless the data of `to` is null.
  void write_rows(const PixelRows& to, int64_t first, int count, const float (*gradient)[T]) const {
    if (to.data == nullptr) return;
    char* rows[T];
    row_addresses<T, char*>(call_.shape, to, first, count, rows);
    store_rows<FloatOperand, D, T>(to.dtype, gradient, count, rows, row_writes<D>(to, rows_));
  }

  const PixelDecoderBackward& call_;
  const int64_t rows_, tiles_;
  const int parts_;
  DecoderTraining<Operand, D, T, RowOrder> training_;
};

}  // namespace

void pixel_decoder_backward(const PixelDecoderBackward& call) {
  with_operand_and_width(call.cond.dtype, call.shape.decoder_width, [&](auto operand, auto width) {
    constexpr int kTile = width < 64 ? 64 : 32;  // limits the scratch memory of a tile at D = 64, N = 8
    Backward<decltype(operand), width.value, kTile>(call).run();
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
