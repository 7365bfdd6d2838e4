// Backward of the decoder's head (formula in decoder_kernels.h). Persistent grid; ownership is that of pixel_decoder.cu,
// whose operand tiles of h_N it reads. Per pixel: reads 2·D bytes and C values, writes 2·D bytes of the gradient of h_N.
// Deterministic: the gradient of the head is summed per thread block in a fixed order.
#include "cuda/block.h"
#include "cuda/decoder_kernels.h"
#include "cuda/gradient_sums.h"
#include "cuda/warp_pixels.h"

namespace deco::cuda {

namespace {

constexpr int kBlocksPerMultiprocessor = 2;

struct HeadParams {
  DecoderHead op;
  PixelRange range;
  int parts = 0;

  template <class V>
  void visit(V& buffers) const {
    const DecoderShape& shape = op.shape;
    const int width = shape.decoder_width;
    op.packed.visit(buffers, false, shape.depth, width, kBlockMatrices, shape.pixels_per_token());
    op.grad_velocity.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    buffers.read(op.h_tiles, 2 * tiled_values(range.count, width));
    buffers.write(op.grad_h_tiles, 2 * tiled_values(range.count, width));
    buffers.write(op.partials, int64_t{4} * parts * (width + 1) * kChannelSlots);
  }
};

template <class T, int D, bool General, bool Extended>
DECO_KERNEL(kThreads, kBlocksPerMultiprocessor, head_kernel, const HeadParams p) {
  constexpr int M = kTiles<D>;
  using Pixels = WarpPixels<M, General>;
  const DecoderHead& op = p.op;
  const DecoderEnds<T, D> ends{shared_memory()};
  const int channels = op.shape.channels;
  wait_for_previous_kernel();
  ends.fill(op.packed);
  const auto of_gradient = Pixels::lane_of(p.range, op.grad_velocity, image_channel(0, channels),
                                           image_channel(1, channels), shared_memory() + DecoderEnds<T, D>::kBytes);
  block_barrier();

  ChannelGradient<T, D> head_gradient;
  head_gradient.clear();
  const bool sums = op.partials != nullptr;
  const uint32_t turn = block_count() * kBlockPixels<D>;
  for (uint32_t begin = block() * kBlockPixels<D>; begin < p.range.count; begin += turn) {
    const uint32_t first = begin + warp() * kWarpPixels<D>, tile = first / kTilePixels;
    const Pixels pixels(p.range, first);
    uint32_t grad_velocity[M][2];
    channel_words<T>(grad_velocity, load_stored(pixels.addresses(op.grad_velocity, of_gradient), false), false);
    pixels.clear_missing(grad_velocity);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      Tile<D> n = tile_of<T>(load_tile<D>(op.h_tiles, tile + m));
      const RowPair rstd = normalize(n, op.eps, !Extended);
      if (sums && pixels.any_exists()) head_gradient.add(rounded<T>(n), grad_velocity[m]);
      const Tile<D> grad_h = head_backward<T, D>(grad_velocity[m], n, rstd, ends.head(), !Extended);
      store_tile<D>(lane_words<D>(op.grad_h_tiles, tile + m), rounded<T>(grad_h));
    }
  }
  if (sums)
    head_gradient.write(op.partials + int64_t{block()} * head_gradient.kNumbers,
                        reinterpret_cast<float*>(shared_memory()), op.accumulate);
}

template <class T, int D, bool Extended>
Status run(const Call& call, const HeadParams& p) {
  const DecoderShape& s = p.op.shape;
  const int sums = kWarps * ChannelGradient<T, D>::kNumbers * 4;
  const LaunchSize size = {p.parts, kThreads, std::max(DecoderEnds<T, D>::kBytes + kLaneBytes, sums), true};
  const int64_t of_gradient = p.op.grad_velocity.bytes(s.batch, s.channels, s.height, s.width);
  return with_pixels<kTiles<D>>(s, {of_gradient}, [&](auto general) {
    return launch("pixel_decoder_head", head_kernel<T, D, general.value, Extended>, size, call.stream, p);
  });
}

}  // namespace

int decoder_head_parts(const DeviceLimits& limits, int width, int64_t pixels) {
  return grid_blocks(pixels, width <= 32 ? kBlockPixels<32> : kBlockPixels<64>, limits, kBlocksPerMultiprocessor);
}

Status decoder_head(const Call& call, DType operand, const DecoderHead& op, bool rms) {
  HeadParams p;
  p.op = op;
  p.range = {patch_grid(op.shape), 0, static_cast<uint32_t>(op.shape.pixels())};
  p.parts = decoder_head_parts(call.limits, op.shape.decoder_width, op.shape.pixels());
  return with_kernel(operand, op.shape.decoder_width, [&](auto type, auto width) {
    return with_extension(rms,
                          [&](auto extended) { return run<decltype(type), width.value, extended.value>(call, p); });
  });
}

}  // namespace deco::cuda
