// Forward of pixel_decoder: the whole decoder in one kernel.
//
//   h = W_x·x + table[k];  N decoder blocks (block.h);  velocity = W_out·LayerNorm(h) + b_out
//
// Extended (decoder_kernels.h): h gets a query, 2·D bytes per pixel; the head's norm may be RMSNorm.
// It may also keep what the backward needs: it writes the rounded SiLU(cond), the input of each
// decoder block and that of the head as operand tiles, 2·D·(N + 2) bytes per pixel.
//
// Persistent grid of one thread block per multiprocessor; a warp owns M tiles of 16 pixels at a time. Activations stay
// in registers. Shared memory holds the weights of all decoder blocks, or of one decoder block at a time if they do not
// fit. Per pixel: 2·D bytes of cond, C values of the image and of the velocity; 2·(5·N·D² + 2·C·D) FLOPs.
// Deterministic: the result of a pixel depends only on that pixel, so the bits do not depend on the grid.
#include "cuda/block.h"
#include "cuda/decoder_kernels.h"
#include "cuda/warp_pixels.h"

namespace deco::cuda {

namespace {

struct ForwardParams {
  DecoderForward op;
  PixelRange range;
  int64_t rows = 0;       // padded_rows(pixels): pixels per array of operand tiles
  bool resident = false;  // the weights of all decoder blocks fit in shared memory
  DecoderExtension extension;

  template <class V>
  void visit(V& buffers) const {
    const DecoderShape& shape = op.shape;
    const int width = shape.decoder_width;
    op.packed.visit(buffers, false, shape.depth, width, kBlockMatrices, shape.pixels_per_token());
    op.image.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    op.velocity.visit(buffers, true, shape.batch, shape.channels, shape.height, shape.width);
    op.cond.visit(buffers, range.count, width);
    extension.query.visit(buffers, range.count, width);
    buffers.write(op.h_tiles, int64_t{2} * (shape.depth + 1) * rows * width);
    buffers.write(op.s_tiles, int64_t{2} * rows * width);
  }
};

template <bool Extended>
constexpr int kLanes = (Extended ? 4 : 3) * kLaneBytes;

template <class T, int D, bool Extended>
int shared_bytes(int slots) {
  return DecoderEnds<T, D>::kBytes + kLanes<Extended> + slots * BlockSlots<T, D>::kBytes;
}

template <class T, int D, bool General, bool Keeps, bool Extended>
DECO_KERNEL(kThreads, 1, forward_kernel, const ForwardParams p) {
  constexpr int M = kTiles<D>;
  const DecoderForward& op = p.op;
  const DecoderEnds<T, D> ends{shared_memory()};
  char* lanes = shared_memory() + DecoderEnds<T, D>::kBytes;
  const BlockSlots<T, D> slots{lanes + kLanes<Extended>};
  const int depth = op.shape.depth, channels = op.shape.channels;
  if constexpr (Keeps) wait_for_previous_kernel();
  ends.fill(op.packed);
  if (p.resident)
    for (int l = 0; l < depth; ++l) slots.fill(l, op.packed, l);

  using Pixels = WarpPixels<M, General>;
  const int channel = 2 * (lane() & 3);  // of the velocity; only lanes with t < 2 hold channels
  const auto of_cond = Pixels::lane_of(p.range, op.cond, lane_channel<D>(), lanes);
  const auto of_velocity = Pixels::lane_of(p.range, op.velocity, channel, channel + 1, lanes + kLaneBytes);
  const auto of_image = Pixels::lane_of(p.range, op.image, image_channel(0, channels), image_channel(1, channels),
                                        lanes + 2 * kLaneBytes);
  [[maybe_unused]] typename Pixels::Lane of_query{};
  if constexpr (Extended)
    of_query = Pixels::lane_of(p.range, p.extension.query, lane_channel<D>(), lanes + 3 * kLaneBytes);
  const bool centered = !(Extended && p.extension.rms);
  block_barrier();

  const BlockWeights<T, D> weights = slots.first_held();
  const int step = held(p.resident ? slots.kElements : 0);  // to the weights of the next decoder block
  const uint32_t turn = block_count() * kBlockPixels<D>;
  RowWords<D> cond[2 * M];
  StoredChannels<M> image;
  const bool is_float32 = op.image.dtype == DType::kFloat32;
  const auto load_inputs = [&](const Pixels& pixels) {
    image = load_stored(pixels.addresses(op.image, of_image), is_float32);
    load_rows<D, M>(cond, pixels, op.cond, of_cond);
  };
  if constexpr (kAhead<D>) load_inputs(Pixels(p.range, block() * kBlockPixels<D> + warp() * kWarpPixels<D>));
  for (uint32_t begin = block() * kBlockPixels<D>; begin < p.range.count; begin += turn) {
    const uint32_t first = begin + warp() * kWarpPixels<D>;
    const Pixels pixels(p.range, first);
    Tile<D> h[M];
    Operand<D> s[M];
    uint32_t x[M][2];
    if constexpr (!kAhead<D>) load_inputs(pixels);
    channel_words<T>(x, image, is_float32);
    [[maybe_unused]] RowWords<D> query[2 * M];
    if constexpr (Extended) load_query<D, M>(query, pixels, p.extension.query, of_query);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      s[m] = silu_operand<T>(cond[2 * m], cond[2 * m + 1]);
      embed<T, D>(h[m], x[m], ends.pixel(), op.packed.table + pixels.patch_tile(m) * (kTilePixels * D));
      if constexpr (Extended) add_query<T>(h[m], query[2 * m], query[2 * m + 1]);
      if constexpr (Keeps) store_tile<D>(lane_words<D>(op.s_tiles, first / kTilePixels) + m * kTileWords<D>, s[m]);
    }
    if constexpr (kAhead<D>) load_inputs(Pixels(p.range, first + turn));
    BlockWeights<T, D> of_block = weights;
    Words4* h_words = Keeps ? lane_words<D>(op.h_tiles, first / kTilePixels) : nullptr;
    const auto keep_h = [&] {
#pragma unroll
      for (int m = 0; m < M; ++m) store_tile<D>(h_words + m * kTileWords<D>, rounded<T>(h[m]));
    };
#pragma unroll 1
    for (int l = 0; l < depth; ++l) {
      if (step == 0) {
        // region: refill_of_forward
        block_barrier();
        slots.fill(0, op.packed, l);
        block_barrier();
        // end region
      }
      if constexpr (Keeps) {
        keep_h();
        h_words += p.rows / kTilePixels * kTileWords<D>;
      }
      block_forward<T, D, M>(h, s, of_block, op.eps);
      of_block = of_block.later(step);
    }
    if constexpr (Keeps) keep_h();
    Operand<D> normalized[M];
    float velocity[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      normalize(h[m], op.eps, centered);
      normalized[m] = rounded<T>(h[m]);
    }
    ends.head(weights.selector).apply(velocity, normalized, 0);
    const ChannelAddresses<M> out = pixels.addresses(op.velocity, of_velocity);
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

template <class T, int D, bool Keeps, bool Extended>
Status run(const Call& call, ForwardParams p) {
  const DecoderShape& s = p.op.shape;
  p.resident = shared_bytes<T, D, Extended>(s.depth) <= call.limits.shared_bytes;
  const LaunchSize size = {grid_blocks(p.range.count, kBlockPixels<D>, call.limits, 1), kThreads,
                           shared_bytes<T, D, Extended>(p.resident ? s.depth : 1), Keeps};
  const int64_t of_image = p.op.image.bytes(s.batch, s.channels, s.height, s.width);
  const int64_t of_velocity = p.op.velocity.bytes(s.batch, s.channels, s.height, s.width);
  const int64_t of_cond = p.op.cond.bytes(p.range.count, D), of_query = p.extension.query.bytes(p.range.count, D);
  const char* name = Keeps ? "pixel_decoder_keeping_forward" : "pixel_decoder_forward";
  return with_pixels<kTiles<D>>(s, {of_image, of_velocity, of_cond, of_query}, [&](auto general) {
    return launch(name, forward_kernel<T, D, general.value, Keeps, Extended>, size, call.stream, p);
  });
}

}  // namespace

Status decoder_forward(const Call& call, DType operand, const DecoderForward& op, const DecoderExtension& extension) {
  ForwardParams p;
  p.op = op;
  p.range = {patch_grid(op.shape), 0, static_cast<uint32_t>(op.shape.pixels())};
  p.rows = padded_rows(op.shape.pixels());
  p.extension = extension;
  return with_kernel(operand, op.shape.decoder_width, [&](auto type, auto width) {
    return with_extension(extension.any(), [&](auto extended) {
      return op.h_tiles == nullptr ? run<decltype(type), width.value, false, extended.value>(call, p)
                                   : run<decltype(type), width.value, true, extended.value>(call, p);
    });
  });
}

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
  DecoderForward forward;
  WorkspaceParts parts(call.workspace);
  forward.packed =
      PackedWeights::take(parts, shape.depth, shape.decoder_width, kBlockMatrices, shape.pixels_per_token());
  forward.shape = shape;
  forward.image = Image(op.image);
  forward.velocity = Image(op.velocity);
  forward.cond = rows_of(op.cond, shape);
  forward.eps = op.eps;
  if (op.activations != nullptr) {
    forward.h_tiles = op.activations;
    const int64_t of_block = tiled_values(shape.pixels(), shape.decoder_width);
    forward.s_tiles = static_cast<uint16_t*>(op.activations) + (shape.depth + 1) * of_block;
  }
  const Status packed = pack_decoder(call, op.cond.dtype, forward.packed, op.weights, shape);
  const DecoderExtension extension = {rows_of(op.query, shape), op.head_norm != 0};
  return packed.ok() ? decoder_forward(call, op.cond.dtype, forward, extension) : packed;
}

}  // namespace deco::cuda
