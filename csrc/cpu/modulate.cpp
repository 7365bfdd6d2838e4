// upsample_modulate after its matmul, on rows of h and cond, the upsampled tokens y. With dm, dgate the incoming
// gradients and l = LayerNorm(h):
//
//   (shift, scale, gate) = W_mod SiLU(y) + b_mod
//   modulated = l (1 + scale) + shift
//
//   dshift = dm, dscale = l dm, dl = (1 + scale) dm, and dh from dl through LayerNorm
//   dy = SiLU'(y) W_mod^T [dshift, dscale, dgate]
//   dW_mod = sum [dshift, dscale, dgate] SiLU(y)^T
//
// Per row the forward reads 2 D values, writes 2 D and takes 3 D^2 multiply-adds; the backward reads 4 D values, writes
// 2 D and takes 7 D^2 multiply-adds, D^2 of them for the recomputed scale.
//
// Deterministic: one thread computes each row of the forward in a fixed order. The backward adds the weights' gradients
// of a part's tiles in order, then the parts in order: bitwise reproducible for a given number of threads.
#include "cpu/decoder_tile_backward.h"
#include "cpu/kernel_table.h"
#include "cpu/modulation_tile.h"
#include "cpu/rows.h"
#include "deco/upsample_modulate.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int T = 32;  // at D = 32 in bfloat16 the tile and the weights fit in the L1 cache

// Rows first .. first + count - 1 of the call.
struct RowTile {
  int64_t first;
  int count;

  int pixels() const { return whole_strips(count); }
};

RowTile tile_at(int64_t index, int64_t rows) {
  const int64_t first = index * T, left = rows - first;
  return {first, static_cast<int>(left < T ? left : T)};
}

// Places of h beyond the end of a tile repeat its first row: a row of zeros has variance 0, and rstd would be infinite
// at eps = 0.
template <int D>
void load_h(const Rows& h, const RowTile& place, float (*tile)[T]) {
  const char* repeated = static_cast<const char*>(h.data) + place.first * h.stride * size_of(h.dtype);
  const char* rows[T];
  row_addresses<T, const char*>(h, place.first, place.count, repeated, rows);
  load_rows<D, T>(h.dtype, rows, place.pixels(), tile);
}

// Places beyond the end of a tile are zero, so that they add nothing to the weights' gradients.
template <int D>
void load_gradient(const Rows& gradient, const RowTile& place, float (*tile)[T]) {
  const char* rows[T];
  row_addresses<T, const char*>(gradient, place.first, place.count, kZeroRow, rows);
  load_rows<D, T>(gradient.dtype, rows, place.pixels(), tile);
}

template <class Operand, int D>
void store_tile(const Rows& to, const RowTile& place, RowWrites writes, const typename Operand::Element (*tile)[T]) {
  char* rows[T];
  row_addresses<T, char*>(to, place.first, place.count, nullptr, rows);
  store_rows<Operand, D, T>(to.dtype, tile, place.count, rows, writes);
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class Operand, int D>
void forward(const ModulateForward& call) {
  const int64_t tiles = (call.rows + T - 1) / T;
  const int parts = part_count(tiles, call.threads);
  BlockWeights<Operand> weights;
  ModulationTile<Operand, D, T>* scratch = nullptr;
  const auto lay_out = [&](Arena& arena) {
    weights = take_modulation_weights<Operand, D>(arena, call.weights, call.h.dtype);
    scratch = arena.take<ModulationTile<Operand, D, T>>(parts);
  };
  with_scratch(lay_out);

  const RowWrites modulated_writes = row_writes<D>(call.modulated, call.rows);
  const RowWrites gate_writes = row_writes<D>(call.gate, call.rows);
  SharedWork work(tiles, parts);
  parallel_matmuls<Operand, D>(parts, [&](int part) {
    ModulationTile<Operand, D, T>& tile = scratch[part];
    work.for_each_share([&](Range share) {
      for (int64_t t = share.begin; t < share.end; ++t) {
        const RowTile place = tile_at(t, call.rows);
        prefetch_rows<D, T>(call.cond, place.first + T, call.rows);
        prefetch_rows<D, T>(call.h, place.first + T, call.rows);
        const char* rows[T];
        row_addresses<T, const char*>(call.cond, place.first, place.count, kZeroRow, rows);
        load_silu_cond<Operand, D, T>(call.cond.dtype, rows, place.pixels(), tile.silu_cond);
        load_h<D>(call.h, place, tile.h);
        modulate_tile(weights, call.eps, place.pixels(), tile);
        store_tile<Operand, D>(call.modulated, place, modulated_writes, tile.modulated);
        store_tile<Operand, D>(call.gate, place, gate_writes, tile.gate);
      }
    });
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

// Working memory of one thread.
template <class Operand, int D>
struct alignas(64) Scratch {
  float h[D][T], grad_modulated[D][T], grad_gate[D][T];
  SavedBlockTile<Operand, D, T> saved;  // only normalized and scale, and what they need
  BlockBackwardTile<Operand, D, T> block;
  BlockGradients<D> gradients;
};

// tile.saved.scale = 1 + W_scale SiLU(y) + b_scale
template <class Operand, int D>
void scale_forward(const BlockWeights<Operand>& w, int pixels, Scratch<Operand, D>& tile) {
  for (int pixel = 0; pixel < pixels; pixel += kStrip) {
    const auto scale = product<Operand, D, D, T>(w.mod + D * D / Operand::kPack, strip_of(tile.block.silu_cond, pixel));
    for (int first = 0; first < D; first += kGroup) {
      GroupSums sums;
      linear(sums, scale, w.mod_bias + D, first);
      unroll<2 * kGroup>(
          [&](auto i) DECO_INLINE_LAMBDA { store(&tile.saved.scale[first + i / 2][pixel + i % 2 * kLanes], sums[i]); });
    }
  }
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
  explicit Backward(const ModulateBackward& call)
      : call_(call),
        tiles_((call.rows + T - 1) / T),
        parts_(part_count(tiles_, call.threads)),
        wanted_{call.grad_cond.data != nullptr, call.grad_weights.mod_weight.data != nullptr},
        grad_h_writes_(row_writes<D>(call.grad_h, call.rows)) {}

  void run() {
    with_scratch([&](Arena& arena) { lay_out(arena); });
    parallel_matmuls<Operand, D>(parts_, [&](int part) {
      Scratch<Operand, D>& tile = scratch_[part];
      std::memset(&tile.gradients, 0, sizeof(tile.gradients));
      const Range share = share_of(tiles_, parts_, part);
      for (int64_t t = share.begin; t < share.end; ++t) {
        const RowTile place = tile_at(t, call_.rows);
        for (const Rows* rows : {&call_.cond, &call_.h, &call_.grad_modulated, &call_.grad_gate})
          prefetch_rows<D, T>(*rows, place.first + T, call_.rows);
        forward(place, tile);
        backward(place, tile);
      }
    });
    add_block_parts<D>(scratch_->gradients, sizeof(*scratch_), parts_, 0, call_.grad_weights);
  }

 private:
  void lay_out(Arena& arena) {
    const DType activation = call_.h.dtype;
    weights_ = take_modulation_weights<Operand, D>(arena, call_.weights, activation);
    transposed_.mod = take_transposed<Operand, D, 3 * D>(arena, call_.weights.mod_weight, 3 * D, activation);
    scratch_ = arena.take<Scratch<Operand, D>>(parts_);
  }

  // What the backward needs of the forward: SiLU(y), SiLU'(y), scale and normalized.
  void forward(const RowTile& place, Scratch<Operand, D>& tile) {
    const char* rows[T];
    row_addresses<T, const char*>(call_.cond, place.first, place.count, kZeroRow, rows);
    load_silu_cond<Operand, D, T>(call_.cond.dtype, rows, place.pixels(), tile.block.silu_cond,
                                  tile.block.silu_cond_derivative);
    scale_forward(weights_, place.pixels(), tile);
    load_h<D>(call_.h, place, tile.h);
    normalize<D, T>(false, tile.h, call_.eps, place.pixels(), tile.saved.mean, tile.saved.rstd, tile.saved.normalized);
  }

  void backward(const RowTile& place, Scratch<Operand, D>& tile) {
    const int pixels = place.pixels();
    load_gradient<D>(call_.grad_modulated, place, tile.grad_modulated);
    load_gradient<D>(call_.grad_gate, place, tile.grad_gate);
    start_backward(pixels, wanted_, tile.block);
    modulation_factors_backward(weights_, pixels, tile);
    if (wanted_.matrices)
      add_weight_gradient<Operand, 3 * D, D, T>(tile.block.grad_modulation.by_pixel(), tile.block.silu_cond_by_pixel,
                                                pixels, tile.gradients.mod_weight);
    if (call_.grad_h.data != nullptr) {
      norm_backward<false, true, D, T>(tile.block.grad_normalized, tile.saved.normalized, tile.saved.rstd, pixels,
                                       tile.block.grad_h);
      store_tile<FloatOperand, D>(call_.grad_h, place, grad_h_writes_, tile.block.grad_h);
    }
    if (wanted_.cond) {
      modulation_backward(transposed_, pixels, tile.block);
      finish_grad_cond(pixels, tile.block);
      // Through the caches: the matmuls of the upsample's gradients read it next.
      store_tile<FloatOperand, D>(call_.grad_cond, place, RowWrites::kCached, tile.block.grad_silu_cond);
    }
  }

  const ModulateBackward& call_;
  const int64_t tiles_;
  const int parts_;
  const WantedGradients wanted_;
  const RowWrites grad_h_writes_;
  BlockWeights<Operand> weights_;
  TransposedBlockWeights<Operand> transposed_;
  Scratch<Operand, D>* scratch_ = nullptr;  // one per part
};

}  // namespace

void modulate_forward(const ModulateForward& call) {
  if (call.rows == 0) return;
  with_operand_and_width(call.h.dtype, call.width,
                         [&](auto operand, auto width) { forward<decltype(operand), width.value>(call); });
}

void modulate_backward(const ModulateBackward& call) {
  with_operand_and_width(call.h.dtype, call.width,
                         [&](auto operand, auto width) { Backward<decltype(operand), width.value>(call).run(); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
