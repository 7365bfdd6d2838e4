// Backward of flow_matching_loss. With a and f the gradients of the sums of d² and of W·(F R M d)² of an image,
// including the sample weight (names as in flow_matching_loss.cu),
//
//   grad_pred             = 2·a·d + Rᵀ Mᵀ·2·f·(A M R d),  grad_target = -grad_pred
//   grad_frequency_weight = sum over images of f·(F R M d)²
//   grad_sample_weight    = (a·sum of d² + f·sum of W·(F R M d)²) / w
//
// With A = m·I + Q (frequency_forms.h), the multiples of the identity and the pixel loss form one 3x3 matrix of RGB in
// float32; only Q uses the tensor cores.
//
// Persistent grid of one thread block per multiprocessor. A warp owns a group of eight 8x8 blocks at a time, in
// registers; the forms are in shared memory. Per pixel: reads 6 values, writes 3; 1,536 FLOPs on the tensor cores.
// Deterministic: the gradient of a pixel depends only on its 8x8 block and the 8x8 blocks that repeat it; sums over
// groups are written per warp or group and added in a fixed order.
#include "cuda/gradient_sums.h"
#include "cuda/loss_plan.h"

namespace deco::cuda {

namespace {

// ---- gradients of the images ----------------------------------------------------------------------------------------

// Symmetric 3x3 matrix of RGB.
struct ColorMatrix {
  float rr, rg, rb, gg, gb, bb;

  DECO_DEVICE ColorMatrix scaled(float factor) const {
    return {factor * rr, factor * rg, factor * rb, factor * gg, factor * gb, factor * bb};
  }
  DECO_DEVICE Color times(float r, float g, float b) const {
    return {fmaf(rr, r, fmaf(rg, g, rb * b)), fmaf(rg, r, fmaf(gg, g, gb * b)), fmaf(rb, r, fmaf(gb, g, bb * b))};
  }
};

// pixel·I + frequency·Mᵀ diag(m) M
DECO_DEVICE ColorMatrix identity_part(const FrequencyForms& forms, const LossGradients::Factors& factors) {
  ColorMatrix k = {factors.pixel, 0, 0, factors.pixel, 0, factors.pixel};
#pragma unroll
  for (int c = 0; c < kColors; ++c) {
    const Color row = ycbcr_row(c);
    const float m = factors.frequency * forms.mean(c);
    k.rr = fmaf(m * row.r, row.r, k.rr);
    k.rg = fmaf(m * row.r, row.g, k.rg);
    k.rb = fmaf(m * row.r, row.b, k.rb);
    k.gg = fmaf(m * row.g, row.g, k.gg);
    k.gb = fmaf(m * row.g, row.b, k.gb);
    k.bb = fmaf(m * row.b, row.b, k.bb);
  }
  return k;
}

template <class Images>
struct GradientParams {
  Images images;
  typename Images::Gradients written;
  bool with_pixel_loss = false;
  BlockGrid grid;
  Array frequency_weight, sample_weight;
  LossGradients gradients;
  bool kept = false;       // whether `written` holds the gradient for an incoming gradient of 1
  Float2* sums = nullptr;  // written: [groups], the sums of flow_matching_loss.cu, or null
  int64_t batch = 0, height = 0, width = 0;

  template <class V>
  void visit(V& buffers) const {
    images.visit(buffers, batch, height, width);
    buffers.write(sums, int64_t{grid.groups} * static_cast<int64_t>(sizeof(Float2)));
    written.visit(buffers, batch, height, width);
    visit_array(buffers, false, frequency_weight, kColors * kSlots);
    visit_array(buffers, false, sample_weight, batch);
    gradients.visit(buffers);
  }
};

// Gradient of d: identity·d + frequency·Mᵀ Q M d. With Sums, also the lane's sums, of 8x8 blocks without padding.
template <bool Sums>
DECO_DEVICE LanePixels gradient(const LanePixels& d, const FrequencyForms& forms, const ColorMatrix& identity,
                                float frequency, LaneSums& sums) {
  LanePixels grad;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < kBlockSide; ++i) {
      const Color color = identity.times(d.v[0][r][i], d.v[1][r][i], d.v[2][r][i]);
      grad.v[0][r][i] = color.r;
      grad.v[1][r][i] = color.g;
      grad.v[2][r][i] = color.b;
      if constexpr (Sums)
        for (int c = 0; c < kColors; ++c) sums.pixel = fmaf(d.v[c][r][i], d.v[c][r][i], sums.pixel);
    }
#pragma unroll 1  // one channel's operands at a time fit in the registers
  for (int c = 0; c < kColors; ++c) {
    const Color row = ycbcr_row(c);
    const BlockOperand x = block_operand(d, row);
    const SplitMatrix remainder = forms.remainder(c);
    const Color factor = {frequency * row.r, frequency * row.g, frequency * row.b};
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j) {
      float product[2];
      remainder.multiply_rows(product, x, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = j / 4, i = 2 * (j % 4) + e;
        grad.v[0][r][i] = fmaf(factor.r, product[e], grad.v[0][r][i]);
        grad.v[1][r][i] = fmaf(factor.g, product[e], grad.v[1][r][i]);
        // region: frequency_part_of_blue
        grad.v[2][r][i] = fmaf(factor.b, product[e], grad.v[2][r][i]);
        // end region
        if constexpr (Sums) {
          const float value = channel_value(d, row, r, i);
          squares = fmaf(value, value, squares);
          sums.remainder = fmaf(value, product[e], sums.remainder);
        }
      }
    }
    if constexpr (Sums) sums.scaled = fmaf(forms.mean(c), squares, sums.scaled);
  }
  return grad;
}

template <class Images, bool Sums>
DECO_KERNEL(kLossThreads, 1, gradient_kernel, const GradientParams<Images> p) {
  if (p.kept && p.gradients.incoming_is_one()) return;
  const FrequencyForms forms(shared_memory());
  const uint32_t stride = block_count() * kLossWarps;
  uint32_t group = block() * kLossWarps + warp();
  GroupReader<Images> reader(p.images, p.grid);
  reader.fetch(group);
  forms.build(p.frequency_weight);
  LossGradients::Factors factors = p.gradients.factors();
  if (!p.with_pixel_loss) factors.pixel = 0.0f;
  const ColorMatrix identity = identity_part(forms, factors);
  for (; group < p.grid.groups; group += stride) {
    const float weight = weight_of(p.sample_weight, reader.place().pixel.image);
    const LanePixels d = reader.differences();
    reader.fetch(group + stride);
    LaneSums sums = {0, 0, 0};
    const LanePixels grad = gradient<Sums>(d, forms, identity.scaled(weight), factors.frequency * weight, sums);
    const LanePlace place = locate(p.grid, group);  // recomputed, to save registers
    if constexpr (Sums) write_group_sums(p.sums + group, sums, place.exists);
    if (place.exists) p.written.store(place.pixel, grad);
  }
}

template <bool Sums, class Images>
Status run_gradient(const Call& call, const LossPlan& plan, const LossGradients& gradients, const Images& images,
                    const typename Images::Gradients& written, bool with_pixel_loss, Float2* sums, bool kept = false) {
  GradientParams<Images> p;
  p.images = images;
  p.written = written;
  p.with_pixel_loss = with_pixel_loss;
  p.grid = plan.grid;
  p.frequency_weight = plan.inputs.frequency_weight;
  p.sample_weight = plan.inputs.sample_weight;
  p.gradients = gradients;
  p.kept = kept;
  p.sums = sums;
  p.batch = plan.inputs.batch;
  p.height = plan.padded_height;
  p.width = plan.padded_width;
  const char* name = Sums ? "flow_matching_loss_gradient_and_sums" : "flow_matching_loss_gradient";
  return launch(name, gradient_kernel<Images, Sums>, plan.launch_size(call, FrequencyForms::kBytes), call.stream, p);
}

// ---- gradient of frequency_weight -----------------------------------------------------------------------------------

struct SpectrumParams {
  PaddedDifference images;
  BlockGrid grid;
  Array sample_weight;
  float* partials = nullptr;  // written: [thread blocks·warps][3, 8, 8]
  bool accumulate = false;    // add to the partials instead of overwriting them
  int64_t parts = 0, batch = 0, height = 0, width = 0;

  template <class V>
  void visit(V& buffers) const {
    images.visit(buffers, batch, height, width);
    visit_array(buffers, false, sample_weight, batch);
    buffers.write(partials, 4 * parts * kColors * kSlots);
  }
};

// A warp sums w·(F M d)² over its groups; a lane holds frequencies 8j + 2t and 8j + 2t + 1 of its 8x8 blocks.
DECO_KERNEL(kLossThreads, 1, spectrum_kernel, const SpectrumParams p) {
  const SplitMatrix dct{reinterpret_cast<BFloat16*>(shared_memory())};
  build_dct(dct);
  const uint32_t first = block() * kLossWarps + warp(), stride = block_count() * kLossWarps;
#pragma unroll 1  // one channel's sums at a time fit in the registers
  for (int c = 0; c < kColors; ++c) {
    float sums[kSlots / 8][2] = {};
    GroupReader<PaddedDifference> reader(p.images, p.grid);
    for (uint32_t group = first; group < p.grid.groups; group += stride) {
      reader.fetch(group);
      const LanePlace place = reader.place();
      const float weight = weight_of(p.sample_weight, place.pixel.image);
      const BlockOperand x = block_operand(reader.differences(), ycbcr_row(c));
#pragma unroll
      for (int j = 0; j < kSlots / 8; ++j) {
        float coefficient[2];
        dct.multiply_rows(coefficient, x, j);
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (place.exists) sums[j][e] = fmaf(weight * coefficient[e], coefficient[e], sums[j][e]);
      }
    }
    float* part = p.partials + (int64_t{first} * kColors + c) * kSlots;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = sums[j][e];
        for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane() < 4) {
          float* place = part + 8 * j + 2 * lane() + e;
          store(place, p.accumulate ? load(place) + sum : sum);
        }
      }
  }
}

struct FrequencyWeightParams {
  const float* sums = nullptr;  // [3, 8, 8]
  Array gradient;               // written
  LossGradients gradients;

  template <class V>
  void visit(V& buffers) const {
    buffers.read(sums, 4 * kColors * kSlots);
    visit_array(buffers, true, gradient, kColors * kSlots);
    gradients.visit(buffers);
  }
};

DECO_KERNEL(kColors* kSlots, 1, frequency_weight_kernel, const FrequencyWeightParams p) {
  store_float(p.gradient, thread(), p.gradients.sum_factors().frequency * load(p.sums + thread()));
}

// ---- gradient of sample_weight --------------------------------------------------------------------------------------

struct SampleWeightParams {
  const Float2* sums = nullptr;  // [B][groups of an image]
  uint32_t groups_per_image = 0;
  Array gradient;  // written: [B]
  LossGradients gradients;
  int64_t batch = 0;

  template <class V>
  void visit(V& buffers) const {
    buffers.read(sums, batch * groups_per_image * static_cast<int64_t>(sizeof(Float2)));
    visit_array(buffers, true, gradient, batch);
    gradients.visit(buffers);
  }
};

// A warp adds the sums of an image: each lane every 32nd group, then the lanes in a fixed order.
DECO_KERNEL(kLossThreads, 1, sample_weight_kernel, const SampleWeightParams p) {
  const LossGradients::Factors factors = p.gradients.sum_factors();
  for (int64_t image = block() * kLossWarps + warp(); image < p.batch; image += block_count() * kLossWarps) {
    Float2 sum = {0, 0};
    for (uint32_t group = lane(); group < p.groups_per_image; group += 32) {
      const Float2 sums = load(p.sums + image * p.groups_per_image + group);
      sum.x += sums.x;
      sum.y += sums.y;
    }
    const float pixel = warp_sum(sum.x), frequency = warp_sum(sum.y);
    if (lane() == 0) store_float(p.gradient, image, fmaf(factors.pixel, pixel, factors.frequency * frequency));
  }
}

// Layout of the backward's workspace; parts that are not needed are null.
struct BackwardParts {
  float *difference = nullptr, *partials = nullptr, *spectrum = nullptr;
  Float2* sums = nullptr;
  int64_t bytes;

  BackwardParts(const LossPlan& plan, const FlowMatchingLossBackward& op, const DeviceLimits& limits, void* workspace) {
    WorkspaceParts parts(workspace);
    const bool spectral = op.grad_frequency_weight.data != nullptr;
    if (spectral || !plan.reads_in_place()) difference = parts.take<float>(plan.difference_values());
    if (spectral) {
      partials = parts.take<float>(int64_t{limits.multiprocessors} * kLossWarps * kColors * kSlots);
      spectrum = parts.take<float>(kColors * kSlots);
    }
    if (op.grad_sample_weight.data != nullptr) sums = parts.take<Float2>(plan.grid.groups);
    bytes = parts.bytes();
  }
};

Status image_gradients(const Call& call, const LossPlan& plan, const FlowMatchingLossBackward& op, float* difference) {
  const LossGradients gradients(plan, op);
  const auto written = [&](const Array& gradient) {
    return Image(LossPlan::contiguous_image(gradient, plan.inputs.height, plan.inputs.width));
  };
  if (plan.reads_in_place())
    return write_gradients(call, plan, gradients, written(op.grad_pred), written(op.grad_target), nullptr,
                           op.grad_pred_is_kept != 0);
  const PaddedDifference images = plan.padded_difference(difference);
  const Status status = run_gradient<false>(call, plan, gradients, images, {images.image}, false, nullptr);
  return status.ok() ? fold_gradients(call, plan, op, difference) : status;
}

}  // namespace

Status write_gradients(const Call& call, const LossPlan& plan, const LossGradients& gradients, const Image& grad_pred,
                       const Image& grad_target, Float2* sums, bool kept) {
  return plan.with_image_pair([&](const auto& images) {
    const auto run = sums == nullptr ? run_gradient<false, std::decay_t<decltype(images)>>
                                     : run_gradient<true, std::decay_t<decltype(images)>>;
    return run(call, plan, gradients, images, {grad_pred, grad_target}, true, sums, kept);
  });
}

int frequency_parts(const Call& call, const LossPlan& plan) {
  return plan.launch_size(call, SplitMatrix::kBytes).blocks * kLossWarps;
}

Status sum_frequencies(const Call& call, const LossPlan& plan, float* difference, float* partials, bool accumulate) {
  SpectrumParams p;
  p.images = plan.padded_difference(difference);
  p.grid = plan.grid;
  p.sample_weight = plan.inputs.sample_weight;
  p.partials = partials;
  p.accumulate = accumulate;
  p.parts = frequency_parts(call, plan);
  p.batch = plan.inputs.batch;
  p.height = plan.padded_height;
  p.width = plan.padded_width;
  return launch("flow_matching_loss_spectrum", spectrum_kernel, plan.launch_size(call, SplitMatrix::kBytes),
                call.stream, p);
}

Status frequency_weight_gradient(const Call& call, const LossGradients& gradients, const float* partials, int parts,
                                 float* sum, const Array& gradient) {
  const Status status = sum_partials(call, sum, partials, kColors * kSlots, parts);
  if (!status.ok()) return status;
  return launch("flow_matching_loss_frequency_weight", frequency_weight_kernel, {1, kColors * kSlots, 0}, call.stream,
                FrequencyWeightParams{sum, gradient, gradients});
}

Status sample_weight_gradient(const Call& call, const LossGradients& gradients, const Float2* sums, int64_t batch,
                              uint32_t groups_per_image, const Array& gradient) {
  const LaunchSize size = {grid_blocks(batch, kLossWarps, call.limits, 1), kLossThreads, 0};
  return launch("flow_matching_loss_sample_weight", sample_weight_kernel, size, call.stream,
                SampleWeightParams{sums, groups_per_image, gradient, gradients, batch});
}

int64_t flow_matching_loss_backward_workspace(const DeviceLimits& limits, const FlowMatchingLossBackward& op) {
  return BackwardParts(LossPlan(op.inputs), op, limits, nullptr).bytes;
}

Status flow_matching_loss_backward(const Call& call, const FlowMatchingLossBackward& op) {
  const LossPlan plan(op.inputs);
  if (plan.is_too_large()) return {kTooManyPixels, "flow_matching_loss_backward"};
  const BackwardParts parts(plan, op, call.limits, call.workspace);
  if (call.workspace_bytes < parts.bytes) return {kWorkspaceTooSmall, "flow_matching_loss_backward"};
  const LossGradients gradients(plan, op);
  Status status;
  if (parts.difference != nullptr) status = write_difference(call, plan, parts.difference);
  if (status.ok() && op.grad_sample_weight.data != nullptr) {
    status = sum_groups(call, plan, plan.reads_in_place() ? nullptr : parts.difference, parts.sums);
    if (status.ok())
      status = sample_weight_gradient(call, gradients, parts.sums, op.inputs.batch, plan.grid.groups_per_image.divisor,
                                      op.grad_sample_weight);
  }
  if (op.grad_frequency_weight.data != nullptr) {
    if (status.ok()) status = sum_frequencies(call, plan, parts.difference, parts.partials, false);
    if (status.ok())
      status = frequency_weight_gradient(call, gradients, parts.partials, frequency_parts(call, plan), parts.spectrum,
                                         op.grad_frequency_weight);
  }
  if (status.ok() && (op.grad_pred.data != nullptr || op.grad_target.data != nullptr))
    status = image_gradients(call, plan, op, parts.difference);  // last: it may overwrite the difference
  return status;
}

}  // namespace deco::cuda
