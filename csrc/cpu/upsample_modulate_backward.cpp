// Backward of upsample_modulate down to the gradient of y = W_up token + b_up, one tile (upsample.h) at a time. Each
// tile recomputes its forward; with dm, dgate the incoming gradients and l = LayerNorm(h):
//
//   dshift = dm, dscale = l dm, dl = (1 + scale) dm, and dh from dl through LayerNorm
//   dy = SiLU'(y) W_mod^T [dshift, dscale, dgate]
//   dW_mod = sum [dshift, dscale, dgate] SiLU(y)^T
//
// Per pixel the kernel reads 3 D values, writes 2 D, and takes D Z + 9 D^2 multiply-adds. Each part (thread) adds the
// weights' gradients of its tiles in order, then the parts are added in order: bitwise reproducible for a given number
// of threads.
#include "cpu/decoder_tile_backward.h"
#include "cpu/kernel_table.h"
#include "cpu/rows.h"
#include "cpu/upsample.h"
#include "deco/upsample_modulate.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int T = kTokenTile;

// Working memory of one thread.
template <class Operand, int D>
struct alignas(64) Scratch {
  float h[D][T], grad_modulated[D][T], grad_gate[D][T];
  SavedBlockTile<Operand, D, T> saved;
  BlockBackwardTile<Operand, D, T> block;
  BlockGradients<D> gradients;
};

// Rows beyond the end of the tile are zero, so that they add nothing to the weights' gradients.
template <class Operand, int D>
void load_gradient(const PixelRows& rows, const UpsampleTile<Operand>& place, float (*tile)[T]) {
  const char* addresses[T];
  tile_addresses(rows, place, addresses);
  for (int i = place.count; i < T; ++i) addresses[i] = kZeroRow;
  load_rows<D, T>(rows.dtype, addresses, place.pixels(), tile);
}

template <class Operand, int D>
void store_gradient(const PixelRows& rows, const UpsampleTile<Operand>& place, const float (*tile)[T]) {
  char* addresses[T];
  tile_addresses(rows, place, addresses);
  store_rows<FloatOperand, D, T>(rows.dtype, tile, place.count, addresses, RowWrites::kCached);
}

// Gradients of the modulation, of normalized, and of the biases and norm weights from dm and dgate.
template <class Operand, int D>
void modulation_factors_backward(const BlockWeights<Operand>& w, int pixels, Scratch<Operand, D>& tile) {
  const auto load_pair = [](const float (*from)[T], int d, int pixel, VecF(&to)[2][2]) DECO_INLINE_LAMBDA {
    unroll<4>([&](auto j) DECO_INLINE_LAMBDA { to[j / 2][j % 2] = load(&from[d + j / 2][pixel + j % 2 * kLanes]); });
  };
  for (int d = 0; d < D; d += 2)
    for (int pixel = 0; pixel < pixels; pixel += kStrip) {
      VecF modulated[2][2], gate[2][2];
      load_pair(tile.grad_modulated, d, pixel, modulated);
      load_pair(tile.grad_gate, d, pixel, gate);
      modulate_backward_strip(w, tile.saved, d, pixel, modulated, tile.block, tile.gradients);
      tile.block.grad_modulation.put_strip(2 * D + d, pixel, gate[0], gate[1]);
      unroll<2>([&](auto i) DECO_INLINE_LAMBDA {
        accumulate(tile.gradients.mod_bias[2 * D + d + i], gate[i][0] + gate[i][1]);
      });
    }
}

template <class Operand, int D>
class Backward {
 public:
  explicit Backward(const UpsampleModulateBackward& call)
      : call_(call),
        upsample_(call.upsample, call.threads),
        wanted_{call.grad_cond.data != nullptr, call.grad_weights.mod_weight.data != nullptr} {}

  void run() {
    Arena counter;
    lay_out(counter);
    Arena arena(thread_scratch(counter.used()));
    lay_out(arena);
    for (int part = 0; part < upsample_.parts(); ++part)
      std::memset(&scratch_[part].gradients, 0, sizeof(BlockGradients<D>));
    upsample_.for_each_tile([&](int part, const UpsampleTile<Operand>& place) {
      forward(place, scratch_[part]);
      backward(place, scratch_[part]);
    });
    add_block_parts<D>(scratch_->gradients, sizeof(*scratch_), upsample_.parts(), 0, call_.grad_weights);
  }

 private:
  void lay_out(Arena& arena) {
    const DType activation = call_.upsample.rows.dtype;
    upsample_.lay_out(arena);
    weights_ = take_modulation_weights<Operand, D>(arena, call_.weights, activation);
    transposed_.mod = take_transposed<Operand, D>(arena, call_.weights.mod_weight, 3 * D, activation);
    scratch_ = arena.take<Scratch<Operand, D>>(upsample_.parts());
  }

  void forward(const UpsampleTile<Operand>& place, Scratch<Operand, D>& tile) {
    const char* rows[T];
    tile_addresses(call_.h, place, rows);
    upsample_.load_silu_cond(place, tile.block.silu_cond, tile.block.silu_cond_derivative,
                             [&](int step, int steps) { prefetch_rows<D>(call_.h.dtype, rows, step, steps); });
    load_rows<D, T>(call_.h.dtype, rows, place.pixels(), tile.h);
    layer_norm_statistics<D, T>(tile.h, call_.eps, place.pixels(), tile.saved.mean, tile.saved.rstd);
    for (int pixel = 0; pixel < place.pixels(); pixel += kStrip)
      modulate_strip<true, Operand, D, T>(weights_, tile.block.silu_cond, tile.h, pixel, tile.saved);
  }

  void backward(const UpsampleTile<Operand>& place, Scratch<Operand, D>& tile) {
    const int pixels = place.pixels();
    load_gradient<Operand, D>(call_.grad_modulated, place, tile.grad_modulated);
    load_gradient<Operand, D>(call_.grad_gate, place, tile.grad_gate);
    start_backward(pixels, wanted_, tile.block);
    modulation_factors_backward(weights_, pixels, tile);
    if (wanted_.matrices)
      add_weight_gradient<Operand, 3 * D, D, T>(tile.block.grad_modulation.by_pixel(), tile.block.silu_cond_by_pixel,
                                                pixels, tile.gradients.mod_weight);
    if (call_.grad_h.data != nullptr) {
      layer_norm_backward<false, D, T>(tile.block.grad_normalized, tile.saved.normalized, tile.saved.rstd, pixels,
                                       tile.block.grad_h);
      store_gradient<Operand, D>(call_.grad_h, place, tile.block.grad_h);
    }
    if (wanted_.cond) {
      modulation_backward(transposed_, pixels, tile.block);
      finish_grad_cond(pixels, tile.block);
      store_gradient<Operand, D>(call_.grad_cond, place, tile.block.grad_silu_cond);
    }
  }

  const UpsampleModulateBackward& call_;
  Upsample<Operand, D> upsample_;
  const WantedGradients wanted_;
  BlockWeights<Operand> weights_;
  TransposedBlockWeights<Operand> transposed_;
  Scratch<Operand, D>* scratch_ = nullptr;  // one per part
};

}  // namespace

void upsample_modulate_backward(const UpsampleModulateBackward& call) {
  with_operand_and_width(call.upsample.rows.dtype, call.upsample.width,
                         [&](auto operand, auto width) { Backward<decltype(operand), width.value>(call).run(); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
