// Shared by the ops on rows, adaln_block and upsample_modulate. A row of h and cond is a pixel; a warp of the forward
// kernels owns M tiles of 16 rows at a time. The backward is one step of block_backward.cu.
#pragma once

#include "cuda/block_backward.h"
#include "cuda/decoder_geometry.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

constexpr int kRowThreads = 256;
template <int D>
constexpr int kRowTiles = D <= 32 ? 2 : 1;  // M: two tiles share the loads of weights if they fit in registers
template <int D>
constexpr int kBlockRows = kRowThreads / 32 * kTilePixels * kRowTiles<D>;

// Inputs of a forward kernel.
struct RowsInput {
  PackedWeights packed;
  RowsView h, cond;
  uint32_t rows = 0;
  int width = 0;
  float eps = 0;

  template <class V>
  void visit(V& buffers, int matrices) const {
    packed.visit(buffers, false, 1, width, matrices, 0);
    h.visit(buffers, false, rows, width);
    cond.visit(buffers, false, rows, width);
  }
};

inline int64_t rows_forward_workspace(int width, int matrices) {
  WorkspaceParts parts;
  PackedWeights::take(parts, 1, width, matrices);
  return parts.bytes();
}

inline Status check_rows(const Call& call, const char* op, int64_t rows, int64_t workspace_bytes) {
  if (call.workspace_bytes < workspace_bytes) return {kWorkspaceTooSmall, op};
  if (rows >= kPixelLimit) return {kTooManyPixels, op};
  return {};
}

// Packs the weights of a forward call `op` and calls launch_kernel(type, width, size, input) with the launch size.
template <class Op, class Launch>
Status run_rows_forward(const Call& call, const char* name, const Op& op, int matrices, Launch&& launch_kernel) {
  const Status checked = check_rows(call, name, op.rows, rows_forward_workspace(op.width, matrices));
  if (!checked.ok() || op.rows == 0) return checked;
  WorkspaceParts parts(call.workspace);
  RowsInput input;
  input.packed = PackedWeights::take(parts, 1, op.width, matrices);
  input.h = RowsView(op.h);
  input.cond = RowsView(op.cond);
  input.rows = static_cast<uint32_t>(op.rows);
  input.width = op.width;
  input.eps = op.eps;
  const Status packed = pack_block(call, op.h.dtype, input.packed, op.weights, op.width, matrices);
  if (!packed.ok()) return packed;
  return with_kernel(op.h.dtype, op.width, [&](auto type, auto width) {
    const int blocks = grid_blocks(op.rows, kBlockRows<width.value>, call.limits, 1);
    const int shared_bytes = matrices * width.value * kRowStride<width.value> * 2;
    return launch_kernel(type, width, LaunchSize{blocks, kRowThreads, shared_bytes}, input);
  });
}

// Runs a backward call `op`; `block` holds the incoming gradients and the `mlp` flag.
template <class Op>
Status run_rows_backward(const Call& call, const char* name, const Op& op, BlockBackward block) {
  const Status checked =
      check_rows(call, name, op.rows, single_block_backward_workspace(call.limits, op.width, block.mlp, op.rows));
  if (!checked.ok() || op.rows == 0) return checked;
  block.width = op.width;
  block.operand = op.h.dtype;
  block.pixels = static_cast<uint32_t>(op.rows);
  block.eps = op.eps;
  block.h = RowsView(op.h);
  block.cond = {op.cond.data, op.cond.stride, 0, 0};
  block.grad_h = RowsView(op.grad_h);
  block.grad_cond = RowsView(op.grad_cond);
  return single_block_backward(call, block, op.weights, op.grad_weights);
}

}  // namespace deco::cuda
