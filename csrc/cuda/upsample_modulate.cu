// upsample_modulate after its matmul: with s = SiLU(cond), per row
//
//   shift, scale, gate = W_mod·s + b_mod;  modulated = LayerNorm(h)·(1 + scale) + shift
//
// A warp owns M tiles of 16 rows; SiLU(cond) and the modulation stay in registers. Forward: 8·D bytes and 6·D² FLOPs per
// row; every row's result depends on that row alone. Backward: block_backward.cu without the MLP, then the sums of the
// weight gradients in a fixed order.
#include "cuda/block.h"
#include "cuda/block_backward.h"
#include "cuda/decoder_geometry.h"
#include "deco/cuda/upsample_modulate.h"

namespace deco::cuda {

namespace {

constexpr int kThreads = 256, kTileRows = 16;
template <int D>
constexpr int kTiles = D <= 32 ? 2 : 1;  // of a warp
template <int D>
constexpr int kBlockRows = kThreads / 32 * kTileRows * kTiles<D>;
constexpr int kBlocksPerMultiprocessor = 1;

struct ForwardParams {
  PackedWeights packed;
  RowsView h, cond, modulated, gate;
  uint32_t rows = 0;
  int width = 0;
  float eps = 0;

  template <class V>
  void visit(V& buffers) const {
    packed.visit(buffers, false, 1, width, kModulationMatrices, 0);
    h.visit(buffers, false, rows, width);
    cond.visit(buffers, false, rows, width);
    modulated.visit(buffers, true, rows, width);
    gate.visit(buffers, true, rows, width);
  }
};

template <class T, int D>
DECO_KERNEL(kThreads, kBlocksPerMultiprocessor) modulate_kernel(const ForwardParams p) {
  constexpr int M = kTiles<D>;
  const BlockSlots<T, D, kModulationMatrices> slots{shared_memory()};
  slots.fill(0, p.packed, 0);
  block_barrier();
  const BlockWeights<T, D> weights = slots.block(0, bias_selector<T>());
  const Linear<T, D> to_shift = weights.linear(kShift), to_scale = weights.linear(kScale),
                     to_gate = weights.linear(kGate);
  const uint32_t end = p.rows - 1;
  for (uint32_t begin = block() * kBlockRows<D>; begin < p.rows; begin += block_count() * kBlockRows<D>) {
    const uint32_t first = begin + warp() * (kTileRows * M) + (lane() >> 2);
    Tile<D> normalized[M];
    Operand<D> s[M], modulated[M], gate[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const uint32_t upper = min(first + kTileRows * m, end), lower = min(first + kTileRows * m + 8, end);
      s[m] = silu_operand<T>(load_row<T, D>(p.cond, upper), load_row<T, D>(p.cond, lower));
      normalized[m] = tile_of<T>(load_row<T, D>(p.h, upper), load_row<T, D>(p.h, lower));
      normalize(normalized[m], p.eps);
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
        const uint32_t row = first + kTileRows * m + 8 * r;
        if (row > end) continue;
        store_row<T, D>(p.modulated, row, row_of(modulated[m], r));
        store_row<T, D>(p.gate, row, row_of(gate[m], r));
      }
  }
}

template <class T, int D>
Status run_forward(const Call& call, const ForwardParams& p) {
  const int blocks = grid_blocks(p.rows, kBlockRows<D>, call.limits, kBlocksPerMultiprocessor);
  return launch("upsample_modulate_forward", modulate_kernel<T, D>,
                {blocks, kThreads, BlockSlots<T, D, kModulationMatrices>::kBytes}, call.stream, p);
}

}  // namespace

int64_t modulate_forward_workspace(int width) {
  WorkspaceParts parts;
  PackedWeights::take(parts, 1, width, kModulationMatrices);
  return parts.bytes();
}

Status modulate_forward(const Call& call, const ModulateForward& op) {
  if (call.workspace_bytes < modulate_forward_workspace(op.width))
    return {kWorkspaceTooSmall, "upsample_modulate_forward"};
  if (op.rows >= kPixelLimit) return {kTooManyPixels, "upsample_modulate_forward"};
  if (op.rows == 0) return {};
  WorkspaceParts parts(call.workspace);
  ForwardParams p;
  p.packed = PackedWeights::take(parts, 1, op.width, kModulationMatrices);
  p.h = RowsView(op.h);
  p.cond = RowsView(op.cond);
  p.modulated = {op.modulated, op.width};
  p.gate = {op.gate, op.width};
  p.rows = static_cast<uint32_t>(op.rows);
  p.width = op.width;
  p.eps = op.eps;
  const Status packed = pack_block(call, op.h.dtype, p.packed, op.weights, op.width, kModulationMatrices);
  if (!packed.ok()) return packed;
  return with_kernel(op.h.dtype, op.width,
                     [&](auto type, auto width) { return run_forward<decltype(type), width.value>(call, p); });
}

int64_t modulate_backward_workspace(const DeviceLimits& limits, int64_t rows, int width) {
  return single_block_backward_workspace(limits, width, false, rows);
}

Status modulate_backward(const Call& call, const ModulateBackward& op) {
  if (call.workspace_bytes < modulate_backward_workspace(call.limits, op.rows, op.width))
    return {kWorkspaceTooSmall, "upsample_modulate_backward"};
  if (op.rows >= kPixelLimit) return {kTooManyPixels, "upsample_modulate_backward"};
  if (op.rows == 0) return {};
  BlockBackward block;
  block.width = op.width;
  block.mlp = false;
  block.operand = op.h.dtype;
  block.pixels = op.rows;
  block.eps = op.eps;
  block.h = RowsView(op.h);
  block.cond = {op.cond.data, op.cond.stride, 0, 0};
  block.grad = RowsView(op.grad_modulated);
  block.gate_grad = RowsView(op.grad_gate);
  block.h_grad = {op.grad_h, op.width};
  if (op.grad_cond != nullptr) block.cond_grad = {op.grad_cond, op.width};
  return single_block_backward(call, block, op.weights, op.grad_weights);
}

}  // namespace deco::cuda
