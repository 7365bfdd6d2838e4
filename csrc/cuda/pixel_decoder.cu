// Forward of pixel_decoder: the whole decoder in one kernel.
//
//   h = W_x·x + table[k];  N decoder blocks (block.h);  velocity = W_out·LayerNorm(h) + b_out
//
// Persistent grid of one thread block per multiprocessor; a warp owns M tiles of 16 pixels at a time. Activations stay
// in registers. Shared memory holds the weights of all decoder blocks, or of one decoder block at a time if they do not
// fit. Per pixel: 2·D bytes of cond, C values of the image and of the velocity; 2·(5·N·D² + 2·C·D) FLOPs.
// Deterministic: the result of a pixel depends only on that pixel, so the bits do not depend on the grid.
#include "cuda/block.h"
#include "cuda/warp_pixels.h"

namespace deco::cuda {

namespace {

struct ForwardParams {
  PackedWeights packed;
  Image image, velocity;
  PatchRows cond;
  DecoderShape shape;
  PixelRange range;
  bool resident = false;  // the weights of all decoder blocks fit in shared memory
  float eps = 0;

  template <class V>
  void visit(V& buffers) const {
    packed.visit(buffers, false, shape.depth, shape.decoder_width, kBlockMatrices, shape.pixels_per_token());
    image.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    velocity.visit(buffers, true, shape.batch, shape.channels, shape.height, shape.width);
    cond.visit(buffers, range.count, shape.decoder_width);
  }
};

template <class T, int D>
int shared_bytes(int slots) {
  return DecoderEnds<T, D>::kBytes + 3 * kLaneBytes + slots * BlockSlots<T, D>::kBytes;
}

template <class T, int D, bool General>
DECO_KERNEL(kThreads, 1, forward_kernel, const ForwardParams p) {
  constexpr int M = kTiles<D>;
  const DecoderEnds<T, D> ends{shared_memory()};
  char* lanes = shared_memory() + DecoderEnds<T, D>::kBytes;
  const BlockSlots<T, D> slots{lanes + 3 * kLaneBytes};
  const int depth = p.shape.depth, channels = p.shape.channels;
  ends.fill(p.packed);
  if (p.resident)
    for (int l = 0; l < depth; ++l) slots.fill(l, p.packed, l);

  using Pixels = WarpPixels<M, General>;
  const int channel = 2 * (lane() & 3);  // of the velocity; only lanes with t < 2 hold channels
  const auto of_cond = Pixels::lane_of(p.range, p.cond, lane_channel<D>(), lanes);
  const auto of_velocity = Pixels::lane_of(p.range, p.velocity, channel, channel + 1, lanes + kLaneBytes);
  const auto of_image =
      Pixels::lane_of(p.range, p.image, image_channel(0, channels), image_channel(1, channels), lanes + 2 * kLaneBytes);
  block_barrier();

  const BlockWeights<T, D> weights = slots.first_held();
  const int step = held(p.resident ? slots.kElements : 0);  // to the weights of the next decoder block
  const uint32_t turn = block_count() * kBlockPixels<D>;
  RowWords<D> cond[2 * M];
  if constexpr (kAhead<D>)
    load_rows<D, M>(cond, Pixels(p.range, block() * kBlockPixels<D> + warp() * kWarpPixels<D>), p.cond, of_cond);
  for (uint32_t begin = block() * kBlockPixels<D>; begin < p.range.count; begin += turn) {
    const uint32_t first = begin + warp() * kWarpPixels<D>;
    const Pixels pixels(p.range, first);
    Tile<D> h[M];
    Operand<D> s[M];
    uint32_t x[M][2];
    load_channels<T>(x, pixels.addresses(p.image, of_image), p.image.dtype);
    if constexpr (!kAhead<D>) load_rows<D, M>(cond, pixels, p.cond, of_cond);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      s[m] = silu_operand<T>(cond[2 * m], cond[2 * m + 1]);
      embed<T, D>(h[m], x[m], ends.pixel(), p.packed.table + pixels.patch_tile(m) * (kTilePixels * D));
    }
    if constexpr (kAhead<D>) load_rows<D, M>(cond, Pixels(p.range, first + turn), p.cond, of_cond);
    BlockWeights<T, D> of_block = weights;
#pragma unroll 1
    for (int l = 0; l < depth; ++l) {
      if (step == 0) {
        // region: refill_of_forward
        block_barrier();
        slots.fill(0, p.packed, l);
        block_barrier();
        // end region
      }
      block_forward<T, D, M>(h, s, of_block, p.eps);
      of_block = of_block.later(step);
    }
    Operand<D> normalized[M];
    float velocity[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      normalize(h[m], p.eps);
      normalized[m] = rounded<T>(h[m]);
    }
    ends.head(weights.selector).apply(velocity, normalized, 0);
    const ChannelAddresses<M> out = pixels.addresses(p.velocity, of_velocity);
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const uint32_t word = pack<T>(velocity[i / 2][2 * (i % 2)], velocity[i / 2][2 * (i % 2) + 1]);
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (channel + c < channels && pixels.exists(i))
          store(reinterpret_cast<uint16_t*>(out.row[i][c]), static_cast<uint16_t>(word >> (16 * c)));
    }
  }
}

template <class T, int D>
Status run(const Call& call, ForwardParams p) {
  const DecoderShape& s = p.shape;
  p.resident = shared_bytes<T, D>(s.depth) <= call.limits.shared_bytes;
  const LaunchSize size = {grid_blocks(p.range.count, kBlockPixels<D>, call.limits, 1), kThreads,
                           shared_bytes<T, D>(p.resident ? s.depth : 1)};
  const int64_t of_image = p.image.bytes(s.batch, s.channels, s.height, s.width);
  const int64_t of_velocity = p.velocity.bytes(s.batch, s.channels, s.height, s.width);
  return with_pixels<kTiles<D>>(s, {of_image, of_velocity, p.cond.bytes(p.range.count, D)}, [&](auto general) {
    return launch("pixel_decoder_forward", forward_kernel<T, D, general.value>, size, call.stream, p);
  });
}

}  // namespace

int64_t pixel_decoder_forward_workspace(const DecoderShape& shape) {
  WorkspaceParts parts;
  PackedWeights::take(parts, shape.depth, shape.decoder_width, kBlockMatrices, shape.pixels_per_token());
  return parts.bytes();
}

Status pixel_decoder_forward(const Call& call, const PixelDecoderForward& op) {
  const DecoderShape& shape = op.shape;
  if (call.workspace_bytes < pixel_decoder_forward_workspace(shape))
    return {kWorkspaceTooSmall, "pixel_decoder_forward"};
  if (shape.pixels() >= kPixelLimit) return {kTooManyPixels, "pixel_decoder_forward"};
  if (shape.pixels() == 0) return {};
  ForwardParams p;
  WorkspaceParts parts(call.workspace);
  p.packed = PackedWeights::take(parts, shape.depth, shape.decoder_width, kBlockMatrices, shape.pixels_per_token());
  p.image = Image(op.image);
  p.velocity = Image(op.velocity);
  p.cond = rows_of(op.cond, shape);
  p.shape = shape;
  p.range = {patch_grid(shape), 0, static_cast<uint32_t>(shape.pixels())};
  p.eps = op.eps;
  const DType operand = op.cond.dtype;
  const Status packed = pack_decoder(call, operand, p.packed, op.weights, shape);
  if (!packed.ok()) return packed;
  return with_kernel(operand, shape.decoder_width,
                     [&](auto type, auto width) { return run<decltype(type), width.value>(call, p); });
}

}  // namespace deco::cuda
