// adaln_block: one decoder block (block.h) on rows of h and cond. A row is a pixel; a warp owns M tiles of 16 rows.
//
// Forward: 6·D bytes and 10·D² FLOPs per row; every row's result depends on that row alone. Backward: one step of
// block_backward.cu, then the sums of the weight gradients in a fixed order.
#include "cuda/block.h"
#include "cuda/block_backward.h"
#include "cuda/decoder_geometry.h"
#include "deco/cuda/adaln_block.h"

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
  RowsView h, cond, out;
  uint32_t rows = 0;
  int width = 0;
  float eps = 0;

  template <class V>
  void visit(V& buffers) const {
    packed.visit(buffers, false, 1, width, kBlockMatrices, 0);
    h.visit(buffers, false, rows, width);
    cond.visit(buffers, false, rows, width);
    out.visit(buffers, true, rows, width);
  }
};

template <class T, int D>
DECO_KERNEL(kThreads, kBlocksPerMultiprocessor) forward_kernel(const ForwardParams p) {
  constexpr int M = kTiles<D>;
  const BlockSlots<T, D> slots{shared_memory()};
  slots.fill(0, p.packed, 0);
  block_barrier();
  const BlockWeights<T, D> weights = slots.block(0, bias_selector<T>());
  const uint32_t end = p.rows - 1;
  for (uint32_t begin = block() * kBlockRows<D>; begin < p.rows; begin += block_count() * kBlockRows<D>) {
    const uint32_t first = begin + warp() * (kTileRows * M) + (lane() >> 2);
    Tile<D> h[M];
    Operand<D> s[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const uint32_t upper = min(first + kTileRows * m, end), lower = min(first + kTileRows * m + 8, end);
      s[m] = silu_operand<T>(load_row<T, D>(p.cond, upper), load_row<T, D>(p.cond, lower));
      h[m] = tile_of<T>(load_row<T, D>(p.h, upper), load_row<T, D>(p.h, lower));
    }
    block_forward<T, D, M>(h, s, weights, p.eps);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t row = first + kTileRows * m + 8 * r;
        if (row <= end) store_row<T, D>(p.out, row, row_of<T>(h[m], r));
      }
  }
}

template <class T, int D>
Status run_forward(const Call& call, const ForwardParams& p) {
  const int blocks = grid_blocks(p.rows, kBlockRows<D>, call.limits, kBlocksPerMultiprocessor);
  return launch("adaln_block_forward", forward_kernel<T, D>, {blocks, kThreads, BlockSlots<T, D>::kBytes}, call.stream,
                p);
}

}  // namespace

int64_t adaln_block_forward_workspace(int width) {
  WorkspaceParts parts;
  PackedWeights::take(parts, 1, width, kBlockMatrices);
  return parts.bytes();
}

Status adaln_block_forward(const Call& call, const AdalnBlockForward& op) {
  if (call.workspace_bytes < adaln_block_forward_workspace(op.width)) return {kWorkspaceTooSmall, "adaln_block_forward"};
  if (op.rows >= kPixelLimit) return {kTooManyPixels, "adaln_block_forward"};
  if (op.rows == 0) return {};
  WorkspaceParts parts(call.workspace);
  ForwardParams p;
  p.packed = PackedWeights::take(parts, 1, op.width, kBlockMatrices);
  p.h = RowsView(op.h);
  p.cond = RowsView(op.cond);
  p.out = {op.out, op.width};
  p.rows = static_cast<uint32_t>(op.rows);
  p.width = op.width;
  p.eps = op.eps;
  const Status packed = pack_block(call, op.h.dtype, p.packed, op.weights, op.width, kBlockMatrices);
  if (!packed.ok()) return packed;
  return with_kernel(op.h.dtype, op.width,
                     [&](auto type, auto width) { return run_forward<decltype(type), width.value>(call, p); });
}

int64_t adaln_block_backward_workspace(const DeviceLimits& limits, int64_t rows, int width) {
  return single_block_backward_workspace(limits, width, true, rows);
}

Status adaln_block_backward(const Call& call, const AdalnBlockBackward& op) {
  if (call.workspace_bytes < adaln_block_backward_workspace(call.limits, op.rows, op.width))
    return {kWorkspaceTooSmall, "adaln_block_backward"};
  if (op.rows >= kPixelLimit) return {kTooManyPixels, "adaln_block_backward"};
  if (op.rows == 0) return {};
  BlockBackward block;
  block.width = op.width;
  block.operand = op.h.dtype;
  block.pixels = op.rows;
  block.eps = op.eps;
  block.h = RowsView(op.h);
  block.cond = {op.cond.data, op.cond.stride, 0, 0};
  block.grad = RowsView(op.grad_out);
  block.h_grad = {op.grad_h, op.width};
  if (op.grad_cond != nullptr) block.cond_grad = {op.grad_cond, op.width};
  return single_block_backward(call, block, op.weights, op.grad_weights);
}

}  // namespace deco::cuda
