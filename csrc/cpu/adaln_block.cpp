// adaln_block: one decoder block on rows of h and cond,
//   out = h + gate (W_2 SiLU(W_1 m + b_1) + b_2),  m = LayerNorm(h) (1 + scale) + shift,
//   (shift, scale, gate) = W_mod SiLU(cond) + b_mod.
//
// The forward schedules tiles of T rows dynamically among the parts (threads); in the backward each part owns a
// contiguous share. Per row the forward reads 2 D values, writes D and takes 5 D^2 multiply-adds and 2 D SiLUs; the
// backward reads 3 D values, writes 2 D and takes 15 D^2 multiply-adds, 5 D^2 of them for the recomputed forward.
//
// Deterministic: one thread computes each row of the forward in a fixed order. The backward adds the weights' gradients
// of a part's tiles in order, then the parts in order: bitwise reproducible for a given number of threads.
#include "deco/adaln_block.h"

#include "cpu/decoder_tile_backward.h"
#include "cpu/kernel_table.h"
#include "cpu/rows.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int kTile = 32;  // at D = 32 in bfloat16 the tile and the weights fit in the L1 cache

template <class Operand, int D, int T>
struct alignas(64) ForwardScratch {
  float h[D][T];
  typename Operand::Element silu_cond[D / Operand::kPack][T];
  BlockTile<Operand, D, T> block;
};

template <class Operand, int D>
void forward(const AdalnBlockForward& call) {
  constexpr int T = kTile;
  const int64_t tiles = (call.rows + T - 1) / T;
  const int parts = part_count(tiles, call.threads);
  const DType activation = call.cond.dtype;

  BlockWeights<Operand> weights;
  ForwardScratch<Operand, D, T>* scratch = nullptr;
  const auto lay_out = [&](Arena& arena) {
    take_block_weights<Operand, D>(arena, call.weights, 1, activation, &weights);
    scratch = arena.take<ForwardScratch<Operand, D, T>>(parts);
  };
  with_scratch(lay_out);

  SharedWork work(tiles, parts);
  const RowWrites writes = row_writes<D>(call.out, call.rows);
  parallel_matmuls<Operand, D>(parts, [&](int part) {
    ForwardScratch<Operand, D, T>& tile = scratch[part];
    work.for_each_share([&](Range share) {
      for (int64_t t = share.begin; t < share.end; ++t) {
        const int64_t first = t * T;
        const int count = static_cast<int>(call.rows - first < T ? call.rows - first : T);
        const int pixels = whole_strips(count);
        prefetch_rows<D, T>(call.cond, first + T, call.rows);
        prefetch_rows<D, T>(call.h, first + T, call.rows);
        const char* sources[T];
        row_addresses<T, const char*>(call.cond, first, count, kZeroRow, sources);
        load_silu_cond<Operand, D, T>(activation, sources, pixels, tile.silu_cond);
        row_addresses<T, const char*>(call.h, first, count, kZeroRow, sources);
        load_rows<D, T>(call.h.dtype, sources, pixels, tile.h);
        forward_block<Operand, D, T>(weights, call.eps, tile.silu_cond, pixels, tile.h, tile.block);
        char* targets[T];
        row_addresses<T, char*>(call.out, first, count, nullptr, targets);
        store_rows<FloatOperand, D, T>(call.out.dtype, tile.h, count, targets, writes);
      }
    });
  });
}

template <class Operand, int D, int T>
struct alignas(64) BackwardScratch {
  float h[D][T];
  SavedBlockTile<Operand, D, T> saved;
  BlockBackwardTile<Operand, D, T> block;
  BlockGradients<D> gradients;
};

template <class Operand, int D>
void backward(const AdalnBlockBackward& call) {
  constexpr int T = kTile;
  const int64_t tiles = (call.rows + T - 1) / T;
  const int parts = part_count(tiles, call.threads);
  const DType activation = call.cond.dtype;
  const BlockWeightArrays& grads = call.grad_weights;
  const WantedGradients wanted = {call.grad_cond.data != nullptr,
                                  grads.mod_weight.data || grads.fc1_weight.data || grads.fc2_weight.data};

  BlockWeights<Operand> weights;
  TransposedBlockWeights<Operand> transposed;
  BackwardScratch<Operand, D, T>* scratch = nullptr;
  const auto lay_out = [&](Arena& arena) {
    take_block_weights<Operand, D>(arena, call.weights, 1, activation, &weights);
    take_transposed_block_weights<Operand, D>(arena, call.weights, 1, activation, &transposed);
    scratch = arena.take<BackwardScratch<Operand, D, T>>(parts);
  };
  with_scratch(lay_out);

  parallel_matmuls<Operand, D>(parts, [&](int part) {
    BackwardScratch<Operand, D, T>& tile = scratch[part];
    std::memset(&tile.gradients, 0, sizeof(tile.gradients));
    const Range share = share_of(tiles, parts, part);
    for (int64_t t = share.begin; t < share.end; ++t) {
      const int64_t first = t * T;
      const int count = static_cast<int>(call.rows - first < T ? call.rows - first : T);
      const int pixels = whole_strips(count);
      prefetch_rows<D, T>(call.cond, first + T, call.rows);
      prefetch_rows<D, T>(call.h, first + T, call.rows);
      prefetch_rows<D, T>(call.grad_out, first + T, call.rows);
      const char* sources[T];
      row_addresses<T, const char*>(call.cond, first, count, kZeroRow, sources);
      load_silu_cond<Operand, D, T>(activation, sources, pixels, tile.block.silu_cond, tile.block.silu_cond_derivative);
      // A partial tile repeats its first row: a row of zeros has variance 0, and rstd would be infinite at eps = 0.
      const char* repeated = static_cast<const char*>(call.h.data) + first * call.h.stride * size_of(call.h.dtype);
      row_addresses<T, const char*>(call.h, first, count, repeated, sources);
      load_rows<D, T>(call.h.dtype, sources, pixels, tile.h);
      forward_block<Operand, D, T>(weights, call.eps, tile.block.silu_cond, pixels, tile.h, tile.saved);
      row_addresses<T, const char*>(call.grad_out, first, count, kZeroRow, sources);
      load_rows<D, T>(call.grad_out.dtype, sources, pixels, tile.block.grad_h);
      start_backward(pixels, wanted, tile.block);
      backward_block(weights, transposed, tile.saved, pixels, wanted, tile.block, tile.gradients);
      char* targets[T];
      if (call.grad_h.data != nullptr) {
        row_addresses<T, char*>(call.grad_h, first, count, nullptr, targets);
        store_rows<FloatOperand, D, T>(call.grad_h.dtype, tile.block.grad_h, count, targets,
                                       row_writes<D>(call.grad_h, call.rows));
      }
      if (wanted.cond) {
        finish_grad_cond(pixels, tile.block);
        row_addresses<T, char*>(call.grad_cond, first, count, nullptr, targets);
        store_rows<FloatOperand, D, T>(call.grad_cond.dtype, tile.block.grad_silu_cond, count, targets,
                                       row_writes<D>(call.grad_cond, call.rows));
      }
    }
  });
  add_block_parts<D>(scratch->gradients, sizeof(*scratch), parts, 0, grads);
}

}  // namespace

void adaln_block_forward(const AdalnBlockForward& call) {
  if (call.rows == 0) return;
  with_operand_and_width(call.cond.dtype, call.width,
                         [&](auto operand, auto width) { forward<decltype(operand), width.value>(call); });
}

void adaln_block_backward(const AdalnBlockBackward& call) {
  with_operand_and_width(call.cond.dtype, call.width,
                         [&](auto operand, auto width) { backward<decltype(operand), width.value>(call); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
