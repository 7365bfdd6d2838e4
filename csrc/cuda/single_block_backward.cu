// Backward of a single decoder block, for adaln_block and upsample_modulate (block_backward.h).
#include "cuda/block_backward.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

namespace {

// Layout of the workspace.
struct Parts {
  PackedWeights packed;
  int matrices, parts;
  float *partials, *sums;
  int64_t numbers, bytes;

  Parts(void* workspace, const DeviceLimits& limits, int width, bool mlp, int64_t pixels) {
    WorkspaceParts memory(workspace);
    matrices = mlp ? kBlockMatrices : kModulationMatrices;
    packed = PackedWeights::take(memory, 1, width, matrices);
    parts = block_backward_parts(limits, width, mlp, pixels);
    numbers = int64_t{matrices} * width * (width + 1);
    partials = memory.take<float>(parts * numbers);
    sums = memory.take<float>(numbers);
    bytes = memory.bytes();
  }
};

}  // namespace

int64_t single_block_backward_workspace(const DeviceLimits& limits, int width, bool mlp, int64_t pixels) {
  return pixels == 0 ? 0 : Parts(nullptr, limits, width, mlp, pixels).bytes;
}

Status single_block_backward(const Call& call, BlockBackward op, const BlockWeightArrays& weights,
                             const BlockWeightArrays& gradients) {
  const Parts parts(call.workspace, call.limits, op.width, op.mlp, op.pixels);
  op.packed = parts.packed;
  op.partials = any(gradients) ? parts.partials : nullptr;
  Status status = pack_block(call, op.operand, parts.packed, weights, op.width, parts.matrices);
  if (status.ok()) status = block_backward(call, op);
  if (!status.ok() || op.partials == nullptr) return status;
  status = sum_partials(call, parts.sums, parts.partials, parts.numbers, parts.parts);
  if (!status.ok()) return status;
  return unpack_block_gradients(call, {parts.sums, nullptr, nullptr}, weights, gradients, op.width, parts.matrices);
}

}  // namespace deco::cuda
