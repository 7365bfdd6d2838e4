// Forward of flow_matching_loss. With d = pred - target [B, 3, H, W],
//
//   pixel     = 1/B·sum over b of w_b·mean(d_b²)
//   frequency = 1/B·sum over b of w_b·mean(W·(F R M d_b)²)        mean over the padded size
//   total     = pixel + frequency_scale·frequency
//
// M: RGB -> YCbCr, R: reflection padding to multiples of 8, F: orthonormal 8x8 DCT-II, W: frequency_weight, w:
// sample_weight. The sum over an 8x8 block of one channel is the quadratic form of frequency_forms.h.
//
// Persistent grid of one thread block per multiprocessor. A warp owns a group of eight 8x8 blocks at a time
// (loss_blocks.h), in registers; the forms are in shared memory. Per pixel: reads 6 values; 1,536 FLOPs on the tensor
// cores. Deterministic: the two sums of each group are written to memory, and one thread block adds them in a fixed
// order, so that the bits depend only on the inputs. With the gradient of pred, flow_matching_loss_backward.cu writes
// gradient and sums in one pass.
#include "cuda/loss_plan.h"

namespace deco::cuda {

namespace {

// ---- sums of groups -------------------------------------------------------------------------------------------------

template <class Images>
struct SumsParams {
  Images images;
  BlockGrid grid;
  Array frequency_weight;
  Float2* sums = nullptr;  // written: [groups]
  int64_t batch = 0, height = 0, width = 0;

  template <class V>
  void visit(V& buffers) const {
    images.visit(buffers, batch, height, width);
    visit_array(buffers, false, frequency_weight, kColors * kSlots);
    buffers.write(sums, int64_t{grid.groups} * static_cast<int64_t>(sizeof(Float2)));
  }
};

template <class Images>
DECO_DEVICE LaneSums lane_sums(const Images& images, const FrequencyForms& forms, const LanePixels& d,
                               const PixelPlace& place) {
  LaneSums sums = {0, 0, 0};
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < kBlockSide; ++i) {
      const bool inside = images.is_inside(place.y + r * (kBlockSide / 2), place.x + i);
#pragma unroll
      for (int c = 0; c < kColors; ++c) {
        const float value = inside ? d.v[c][r][i] : 0.0f;
        sums.pixel = fmaf(value, value, sums.pixel);
      }
    }
#pragma unroll 1  // one channel's operands at a time fit in the registers
  for (int c = 0; c < kColors; ++c) {
    const Color row = ycbcr_row(c);
    const BlockOperand x = block_operand(d, row);
    const SplitMatrix remainder = forms.remainder(c);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
      float product[2];
      remainder.multiply_rows(product, x, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = channel_value(d, row, j / 4, 2 * (j % 4) + e);
        squares = fmaf(value, value, squares);
        sums.remainder = fmaf(value, product[e], sums.remainder);
      }
    }
    sums.scaled = fmaf(forms.mean(c), squares, sums.scaled);
  }
  return sums;
}

template <class Images>
DECO_KERNEL(kLossThreads, 1, sums_kernel, const SumsParams<Images> p) {
  const FrequencyForms forms(shared_memory());
  const uint32_t stride = block_count() * kLossWarps;
  uint32_t group = block() * kLossWarps + warp();
  GroupReader<Images> reader(p.images, p.grid);
  reader.fetch(group);
  forms.build(p.frequency_weight);
  for (; group < p.grid.groups; group += stride) {
    const LanePlace place = reader.place();
    const LanePixels d = reader.differences();
    reader.fetch(group + stride);
    write_group_sums(p.sums + group, lane_sums(p.images, forms, d, place.pixel), place.exists);
  }
}

template <class Images>
Status run_sums(const Call& call, const LossPlan& plan, const Images& images, Float2* sums) {
  SumsParams<Images> p;
  p.images = images;
  p.grid = plan.grid;
  p.frequency_weight = plan.inputs.frequency_weight;
  p.sums = sums;
  p.batch = plan.inputs.batch;
  p.height = plan.padded_height;
  p.width = plan.padded_width;
  return launch("flow_matching_loss_sums", sums_kernel<Images>, plan.launch_size(call, FrequencyForms::kBytes),
                call.stream, p);
}

// ---- the losses -----------------------------------------------------------------------------------------------------

constexpr int kTotalThreads = 512;

struct LossesParams {
  const Float2* sums = nullptr;  // [groups]
  uint32_t groups = 0;
  Divider groups_per_image;
  Array sample_weight;
  int64_t batch = 0;
  float pixel_norm = 0, frequency_norm = 0, frequency_scale = 0;
  float *total = nullptr, *pixel = nullptr, *frequency = nullptr;  // written unless null

  template <class V>
  void visit(V& buffers) const {
    buffers.read(sums, int64_t{groups} * static_cast<int64_t>(sizeof(Float2)));
    visit_array(buffers, false, sample_weight, batch);
    for (float* loss : {total, pixel, frequency}) buffers.write(loss, sizeof(float));
  }
};

// One thread block: each thread sums every 512th group, then the threads are added in a fixed order.
DECO_KERNEL(kTotalThreads, 1, losses_kernel, const LossesParams p) {
  auto* warps = reinterpret_cast<Float2*>(shared_memory());
  Float2 sum = {0, 0};
  for (uint32_t group = thread(); group < p.groups; group += kTotalThreads) {
    const float weight = weight_of(p.sample_weight, p.groups_per_image.quotient(group));
    const Float2 sums = load(p.sums + group);
    sum.x = fmaf(weight, sums.x, sum.x);
    sum.y = fmaf(weight, sums.y, sum.y);
  }
  const Float2 warp_total = {warp_sum(sum.x), warp_sum(sum.y)};
  if (lane() == 0) store(warps + warp(), warp_total);
  block_barrier();
  if (thread() != 0) return;
  Float2 total = {0, 0};
  for (int w = 0; w < kTotalThreads / 32; ++w) {
    const Float2 part = load(warps + w);
    total.x += part.x;
    total.y += part.y;
  }
  const float pixel = total.x * p.pixel_norm, frequency = total.y * p.frequency_norm;
  if (p.total != nullptr) store(p.total, fmaf(p.frequency_scale, frequency, pixel));
  if (p.pixel != nullptr) store(p.pixel, pixel);
  if (p.frequency != nullptr) store(p.frequency, frequency);
}

// Layout of the forward's workspace.
struct ForwardParts {
  float* difference = nullptr;  // null: the images are read in place
  Float2* sums;
  int64_t bytes;

  ForwardParts(const LossPlan& plan, void* workspace) {
    WorkspaceParts parts(workspace);
    if (!plan.reads_in_place()) difference = parts.take<float>(plan.difference_values());
    sums = parts.take<Float2>(plan.grid.groups);
    bytes = parts.bytes();
  }
};

Status write_sums_and_gradient(const Call& call, const LossPlan& plan, const FlowMatchingLossForward& op,
                               Float2* sums) {
  const LossGradients gradients(plan, op.frequency_scale, op.grad_total, op.grad_frequency);
  const Image grad_pred(LossPlan::contiguous_image(op.grad_pred, op.inputs.height, op.inputs.width));
  return write_gradients(call, plan, gradients, grad_pred, Image(), sums);
}

}  // namespace

Status sum_groups(const Call& call, const LossPlan& plan, float* difference, Float2* sums) {
  if (difference != nullptr) return run_sums(call, plan, plan.padded_difference(difference), sums);
  return plan.with_image_pair([&](const auto& images) { return run_sums(call, plan, images, sums); });
}

Status write_losses(const Call& call, const LossPlan& batch_plan, const LossScalars& losses, const Float2* sums,
                    uint32_t groups_per_image) {
  const int64_t batch = batch_plan.inputs.batch;
  LossesParams p;
  p.sums = sums;
  p.groups = static_cast<uint32_t>(batch * groups_per_image);
  p.groups_per_image = Divider(groups_per_image);
  p.sample_weight = batch_plan.inputs.sample_weight;
  p.batch = batch;
  p.pixel_norm = batch_plan.pixel_norm();
  p.frequency_norm = batch_plan.frequency_norm();
  p.frequency_scale = losses.frequency_scale;
  p.total = losses.total;
  p.pixel = losses.pixel;
  p.frequency = losses.frequency;
  return launch("flow_matching_loss", losses_kernel,
                {1, kTotalThreads, kTotalThreads / 32 * static_cast<int>(sizeof(Float2))}, call.stream, p);
}

bool loss_keeps_gradient(const FlowMatchingLossInputs& inputs) { return LossPlan(inputs).reads_in_place(); }

int64_t flow_matching_loss_forward_workspace(const FlowMatchingLossForward& op) {
  return ForwardParts(LossPlan(op.inputs), nullptr).bytes;
}

Status flow_matching_loss_forward(const Call& call, const FlowMatchingLossForward& op) {
  const LossPlan plan(op.inputs);
  if (plan.is_too_large()) return {kTooManyPixels, "flow_matching_loss"};
  const ForwardParts parts(plan, call.workspace);
  if (call.workspace_bytes < parts.bytes) return {kWorkspaceTooSmall, "flow_matching_loss"};
  if (parts.difference != nullptr) {
    const Status written = write_difference(call, plan, parts.difference);
    if (!written.ok()) return written;
  }
  const Status summed = op.grad_pred.data == nullptr ? sum_groups(call, plan, parts.difference, parts.sums)
                                                     : write_sums_and_gradient(call, plan, op, parts.sums);
  if (!summed.ok()) return summed;
  const LossScalars losses = {op.frequency_scale, op.total, op.pixel, op.frequency};
  return write_losses(call, plan, losses, parts.sums, plan.grid.groups_per_image.divisor);
}

}  // namespace deco::cuda
