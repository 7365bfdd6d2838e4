// upsample_modulate after the upsample matmul. With s = SiLU(cond), per row:
//
//   shift, scale, gate = W_mod·s + b_mod;  modulated = LayerNorm(h)·(1 + scale) + shift
//
// Forward: a persistent grid of one thread block per multiprocessor; a warp owns M tiles of 16 rows at a time, with
// SiLU(cond) and the modulation in registers and the packed weights in shared memory. Per row: 8·D bytes and 6·D²
// FLOPs.
// Deterministic: the result of a row depends only on that row.
// Backward: block_backward.cu without the MLP, then the sums of the weight gradients in a fixed order.
#include "cuda/block.h"
#include "cuda/row_ops.h"
#include "deco/cuda/upsample_modulate.h"

namespace deco::cuda {

namespace {

struct ForwardParams {
  RowsInput in;
  RowsView modulated, gate;

  template <class V>
  void visit(V& buffers) const {
    in.visit(buffers, kModulationMatrices);
    modulated.visit(buffers, true, in.rows, in.width);
    gate.visit(buffers, true, in.rows, in.width);
  }
};

template <class T, int D>
DECO_KERNEL(kRowThreads, 1, modulate_kernel, const ForwardParams p) {
  constexpr int M = kRowTiles<D>;
  const BlockSlots<T, D, kModulationMatrices> slots{shared_memory()};
  slots.fill(0, p.in.packed, 0);
  block_barrier();
  const BlockWeights<T, D> weights = slots.first();
  const Linear<T, D> to_shift = weights.linear(kShift), to_scale = weights.linear(kScale),
                     to_gate = weights.linear(kGate);
  const uint32_t end = p.in.rows - 1;
  for (uint32_t begin = block() * kBlockRows<D>; begin < p.in.rows; begin += block_count() * kBlockRows<D>) {
    const uint32_t first = begin + warp() * (kTilePixels * M) + (lane() >> 2);
    Tile<D> normalized[M];
    Operand<D> s[M], modulated[M], gate[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const uint32_t upper = min(first + kTilePixels * m, end), lower = min(first + kTilePixels * m + 8, end);
      s[m] = silu_operand<T>(load_row<T, D>(p.in.cond, upper), load_row<T, D>(p.in.cond, lower));
      normalized[m] = tile_of<T>(load_row<T, D>(p.in.h, upper), load_row<T, D>(p.in.h, lower));
      normalize(normalized[m], p.in.eps);
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float shift[M][4], scale[M][4], g[M][4];
      to_shift.apply(shift, s, j);
      to_scale.apply(scale, s, j);
      to_gate.apply(g, s, j);
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) shift[m][i] = fmaf(normalized[m].v[j][i], scale[m][i], shift[m][i]);
        modulated[m].template set<T>(j, shift[m]);
        gate[m].template set<T>(j, g[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t row = first + kTilePixels * m + 8 * r;
        if (row > end) continue;
        store_row<T, D>(p.modulated, row, row_of(modulated[m], r));
        store_row<T, D>(p.gate, row, row_of(gate[m], r));
      }
  }
}

}  // namespace

int64_t modulate_forward_workspace(int width) { return rows_forward_workspace(width, kModulationMatrices); }

Status modulate_forward(const Call& call, const ModulateForward& op) {
  const char* name = "upsample_modulate_forward";
  const auto launch_kernel = [&](auto type, auto width, const LaunchSize& size, const RowsInput& input) {
    const ForwardParams p = {input, RowsView(op.modulated), RowsView(op.gate)};
    return launch(name, modulate_kernel<decltype(type), width.value>, size, call.stream, p);
  };
  return run_rows_forward(call, name, op, kModulationMatrices, launch_kernel);
}

int64_t modulate_backward_workspace(const DeviceLimits& limits, int64_t rows, int width) {
  return single_block_backward_workspace(limits, width, false, rows);
}

Status modulate_backward(const Call& call, const ModulateBackward& op) {
  BlockBackward block;
  block.mlp = false;
  block.grad = RowsView(op.grad_modulated);
  block.grad_gate = RowsView(op.grad_gate);
  return run_rows_backward(call, "upsample_modulate_backward", op, block);
}

}  // namespace deco::cuda
