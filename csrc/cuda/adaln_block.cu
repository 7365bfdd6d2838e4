// adaln_block: one decoder block (formula in block.h) on rows of h and cond. A row is a pixel.
//
// Forward: a persistent grid of one thread block per multiprocessor; a warp owns M tiles of 16 rows at a time, in
// registers, and the packed weights are in shared memory. Per row: 6·D bytes and 10·D² FLOPs. Deterministic: the result
// of a row depends only on that row.
// Backward: one step of block_backward.cu, then the sums of the weight gradients in a fixed order.
#include "cuda/block.h"
#include "cuda/row_ops.h"
#include "deco/cuda/adaln_block.h"

namespace deco::cuda {

namespace {

struct ForwardParams {
  RowsInput in;
  RowsView out;

  template <class V>
  void visit(V& buffers) const {
    in.visit(buffers, kBlockMatrices);
    out.visit(buffers, true, in.rows, in.width);
  }
};

template <class T, int D>
DECO_KERNEL(kRowThreads, 1, forward_kernel, const ForwardParams p) {
  constexpr int M = kRowTiles<D>;
  const BlockSlots<T, D> slots{shared_memory()};
  slots.fill(0, p.in.packed, 0);
  block_barrier();
  const BlockWeights<T, D> weights = slots.first();
  const uint32_t end = p.in.rows - 1;
  for (uint32_t begin = block() * kBlockRows<D>; begin < p.in.rows; begin += block_count() * kBlockRows<D>) {
    const uint32_t first = begin + warp() * (kTilePixels * M) + (lane() >> 2);
    Tile<D> h[M];
    Operand<D> s[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const uint32_t upper = min(first + kTilePixels * m, end), lower = min(first + kTilePixels * m + 8, end);
      s[m] = silu_operand<T>(load_row<T, D>(p.in.cond, upper), load_row<T, D>(p.in.cond, lower));
      h[m] = tile_of<T>(load_row<T, D>(p.in.h, upper), load_row<T, D>(p.in.h, lower));
    }
    block_forward<T, D, M>(h, s, weights, p.in.eps);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t row = first + kTilePixels * m + 8 * r;
        if (row <= end) store_row<T, D>(p.out, row, row_of<T>(h[m], r));
      }
  }
}

}  // namespace

int64_t adaln_block_forward_workspace(int width) { return rows_forward_workspace(width, kBlockMatrices); }

Status adaln_block_forward(const Call& call, const AdalnBlockForward& op) {
  const char* name = "adaln_block_forward";
  const auto launch_kernel = [&](auto type, auto width, const LaunchSize& size, const RowsInput& input) {
    const ForwardParams p = {input, RowsView(op.out)};
    return launch(name, forward_kernel<decltype(type), width.value>, size, call.stream, p);
  };
  return run_rows_forward(call, name, op, kBlockMatrices, launch_kernel);
}

int64_t adaln_block_backward_workspace(const DeviceLimits& limits, int64_t rows, int width) {
  return single_block_backward_workspace(limits, width, true, rows);
}

Status adaln_block_backward(const Call& call, const AdalnBlockBackward& op) {
  BlockBackward block;
  block.grad = RowsView(op.grad_out);
  return run_rows_backward(call, "adaln_block_backward", op, block);
}

}  // namespace deco::cuda
