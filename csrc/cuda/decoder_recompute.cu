// Recompute of the decoder's forward for its backward, then the backward of the head (formula in
// decoder_kernels.h). Grid, ownership and shared memory are those of pixel_decoder.cu; the inputs of the
// decoder blocks, SiLU(cond) and the gradient of h_N are written as operand tiles. Per pixel: reads 2·D bytes of cond,
// as many of a query and 2·C image values, writes 2·D·(N + 2) bytes. Deterministic: the gradient of the head is summed
// per thread block in a fixed order.
#include "cuda/block.h"
#include "cuda/decoder_kernels.h"
#include "cuda/gradient_sums.h"
#include "cuda/warp_pixels.h"

namespace deco::cuda {

namespace {

struct RecomputeParams {
  DecoderRecompute op;
  PixelRange range;
  int64_t rows = 0;  // padded_rows(pixels): pixels per array of operand tiles
  int parts = 0;
  bool resident = false;
  DecoderExtension extension;

  template <class V>
  void visit(V& buffers) const {
    const DecoderShape& shape = op.shape;
    const int width = shape.decoder_width;
    op.packed.visit(buffers, false, shape.depth, width, kBlockMatrices, shape.pixels_per_token());
    op.image.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    op.grad_velocity.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    op.cond.visit(buffers, range.count, width);
    extension.query.visit(buffers, range.count, width);
    buffers.write(op.h_tiles, int64_t{2} * shape.depth * rows * width);
    buffers.write(op.s_tiles, int64_t{2} * rows * width);
    buffers.write(op.grad_h_tiles, int64_t{2} * rows * width);
    buffers.write(op.partials, int64_t{4} * parts * (width + 1) * kChannelSlots);
  }
};

template <bool Extended>
constexpr int kLanes = (Extended ? 4 : 3) * kLaneBytes;

template <class T, int D, bool Extended>
int shared_bytes(int slots) {
  const int sums = kWarps * ChannelGradient<T, D>::kNumbers * 4;
  return std::max(DecoderEnds<T, D>::kBytes + kLanes<Extended> + slots * BlockSlots<T, D>::kBytes, sums);
}

template <class T, int D, bool General, bool Extended>
DECO_KERNEL(kThreads, 1, recompute_kernel, const RecomputeParams p) {
  constexpr int M = kTiles<D>;
  const DecoderRecompute& op = p.op;
  const DecoderEnds<T, D> ends{shared_memory()};
  char* lanes = shared_memory() + DecoderEnds<T, D>::kBytes;
  const BlockSlots<T, D> slots{lanes + kLanes<Extended>};
  const int depth = op.shape.depth, channels = op.shape.channels;
  wait_for_previous_kernel();
  ends.fill(op.packed);
  if (p.resident)
    for (int l = 0; l < depth; ++l) slots.fill(l, op.packed, l);
  using Pixels = WarpPixels<M, General>;
  const int channel = image_channel(0, channels), next = image_channel(1, channels);
  const auto of_cond = Pixels::lane_of(p.range, op.cond, lane_channel<D>(), lanes);
  const auto of_image = Pixels::lane_of(p.range, op.image, channel, next, lanes + kLaneBytes);
  const auto of_gradient = Pixels::lane_of(p.range, op.grad_velocity, channel, next, lanes + 2 * kLaneBytes);
  [[maybe_unused]] typename Pixels::Lane of_query{};
  if constexpr (Extended)
    of_query = Pixels::lane_of(p.range, p.extension.query, lane_channel<D>(), lanes + 3 * kLaneBytes);
  const bool centered = !(Extended && p.extension.rms);
  block_barrier();

  ChannelGradient<T, D> head_gradient;
  head_gradient.clear();
  const bool sums = op.partials != nullptr;
  const BlockWeights<T, D> weights = slots.first_held();
  const int step = held(p.resident ? slots.kElements : 0);  // to the weights of the next decoder block
  const uint32_t turn = block_count() * kBlockPixels<D>;
  RowWords<D> cond[2 * M];
  StoredChannels<M> image, gradient;
  const bool is_float32 = op.image.dtype == DType::kFloat32;
  const auto load_inputs = [&](const Pixels& pixels) {
    image = load_stored(pixels.addresses(op.image, of_image), is_float32);
    gradient = load_stored(pixels.addresses(op.grad_velocity, of_gradient), false);
    load_rows<D, M>(cond, pixels, op.cond, of_cond);
  };
  if constexpr (kAhead<D>) load_inputs(Pixels(p.range, block() * kBlockPixels<D> + warp() * kWarpPixels<D>));
  for (uint32_t begin = block() * kBlockPixels<D>; begin < p.range.count; begin += turn) {
    const uint32_t first = begin + warp() * kWarpPixels<D>;
    const Pixels pixels(p.range, first);
    const uint32_t tile = first / kTilePixels;
    Tile<D> h[M];
    Operand<D> s[M];
    uint32_t x[M][2], grad_velocity[M][2];
    if constexpr (!kAhead<D>) load_inputs(pixels);
    channel_words<T>(x, image, is_float32);
    channel_words<T>(grad_velocity, gradient, false);
    pixels.clear_missing(grad_velocity);
    [[maybe_unused]] RowWords<D> query[2 * M];
    if constexpr (Extended) load_query<D, M>(query, pixels, p.extension.query, of_query);
    Words4* s_words = lane_words<D>(op.s_tiles, tile);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      s[m] = silu_operand<T>(cond[2 * m], cond[2 * m + 1]);
      embed<T, D>(h[m], x[m], ends.pixel(), op.packed.table + pixels.patch_tile(m) * (kTilePixels * D));
      if constexpr (Extended) add_query<T>(h[m], query[2 * m], query[2 * m + 1]);
      store_tile<D>(s_words + m * kTileWords<D>, s[m]);
    }
    if constexpr (kAhead<D>) load_inputs(Pixels(p.range, first + turn));
    BlockWeights<T, D> of_block = weights;
    Words4* h_words = lane_words<D>(op.h_tiles, tile);
#pragma unroll 1
    for (int l = 0; l < depth; ++l) {
      if (step == 0) {
        // region: refill_of_recompute
        block_barrier();
        slots.fill(0, op.packed, l);
        block_barrier();
        // end region
      }
#pragma unroll
      for (int m = 0; m < M; ++m) store_tile<D>(h_words + m * kTileWords<D>, rounded<T>(h[m]));
      block_forward<T, D, M>(h, s, of_block, op.eps);
      of_block = of_block.later(step);
      h_words += p.rows / kTilePixels * kTileWords<D>;
    }
    Words4* grad_h_words = lane_words<D>(op.grad_h_tiles, tile);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const RowPair rstd = normalize(h[m], op.eps, centered);
      if (sums && pixels.any_exists()) head_gradient.add(rounded<T>(h[m]), grad_velocity[m]);
      const Tile<D> grad_h = head_backward<T, D>(grad_velocity[m], h[m], rstd, ends.head(), centered);
      store_tile<D>(grad_h_words + m * kTileWords<D>, rounded<T>(grad_h));
    }
  }
  if (sums)
    head_gradient.write(op.partials + int64_t{block()} * head_gradient.kNumbers,
                        reinterpret_cast<float*>(shared_memory()), op.accumulate);
}

template <class T, int D, bool Extended>
Status run(const Call& call, RecomputeParams p) {
  const DecoderShape& s = p.op.shape;
  p.resident = shared_bytes<T, D, Extended>(s.depth) <= call.limits.shared_bytes;
  const LaunchSize size = {p.parts, kThreads, shared_bytes<T, D, Extended>(p.resident ? s.depth : 1), true};
  const int64_t of_image = p.op.image.bytes(s.batch, s.channels, s.height, s.width);
  const int64_t of_gradient = p.op.grad_velocity.bytes(s.batch, s.channels, s.height, s.width);
  const int64_t of_cond = p.op.cond.bytes(p.range.count, D), of_query = p.extension.query.bytes(p.range.count, D);
  return with_pixels<kTiles<D>>(s, {of_image, of_gradient, of_cond, of_query}, [&](auto general) {
    return launch("pixel_decoder_recompute", recompute_kernel<T, D, general.value, Extended>, size, call.stream, p);
  });
}

}  // namespace

int decoder_recompute_parts(const DeviceLimits& limits, int width, int64_t pixels) {
  return grid_blocks(pixels, width <= 32 ? kBlockPixels<32> : kBlockPixels<64>, limits, 1);
}

Status decoder_recompute(const Call& call, DType operand, const DecoderRecompute& op,
                         const DecoderExtension& extension) {
  RecomputeParams p;
  p.op = op;
  p.range = {patch_grid(op.shape), static_cast<uint32_t>(op.first_pixel), static_cast<uint32_t>(op.pixels)};
  p.rows = padded_rows(op.pixels);
  p.parts = decoder_recompute_parts(call.limits, op.shape.decoder_width, op.pixels);
  p.extension = extension;
  return with_kernel(operand, op.shape.decoder_width, [&](auto type, auto width) {
    return with_extension(extension.any(),
                          [&](auto extended) { return run<decltype(type), width.value, extended.value>(call, p); });
  });
}

}  // namespace deco::cuda
