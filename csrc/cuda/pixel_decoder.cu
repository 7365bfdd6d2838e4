// Forward of pixel_decoder: the whole decoder in one kernel.
//
//   h = W_x·x + table[k];  N decoder blocks (block.h);  velocity = W_out·LayerNorm(h) + b_out
//
// Persistent grid of one thread block per multiprocessor; a warp owns M tiles of 16 pixels at a time. Activations stay
// in registers. Shared memory holds the weights of all decoder blocks, or of one decoder block at a time if they do not
// fit. Per pixel: 2·D bytes of cond, C values of the image and of the velocity; 2·(5·N·D² + 2·C·D) FLOPs.
// Deterministic: the result of a pixel depends only on that pixel, so the bits do not depend on the grid.
#include "cuda/block.h"
#include "cuda/decoder_geometry.h"

namespace deco::cuda {

namespace {

constexpr int kThreads = 256;
template <int D>
constexpr int kTiles = D <= 32 ? 2 : 1;  // per warp: two tiles share the loads of weights if they fit in registers
template <int D>
constexpr int kBlockPixels = kThreads / 32 * 16 * kTiles<D>;

struct ForwardParams {
  PackedWeights packed;
  Image image;
  Planes velocity;
  PatchRows cond;
  PatchGrid grid;
  DecoderShape shape;
  uint32_t pixels = 0;
  bool resident = false;  // the weights of all decoder blocks fit in shared memory
  float eps = 0;

  template <class V>
  void visit(V& buffers) const {
    packed.visit(buffers, false, shape.depth, shape.decoder_width, kBlockMatrices, shape.pixels_per_token());
    image.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    velocity.visit(buffers, shape.batch, shape.channels, shape.height, shape.width);
    cond.visit(buffers, pixels, shape.decoder_width);
  }
};

template <class T, int D>
int shared_bytes(int slots) {
  return DecoderEnds<T, D>::kBytes + slots * BlockSlots<T, D>::kBytes;
}

template <class T, int D>
DECO_KERNEL(kThreads, 1, forward_kernel, const ForwardParams p) {
  constexpr int M = kTiles<D>;
  const DecoderEnds<T, D> ends{shared_memory()};
  const BlockSlots<T, D> slots{shared_memory() + DecoderEnds<T, D>::kBytes};
  const int depth = p.shape.depth, channels = p.shape.channels;
  const uint32_t selector = bias_selector<T>();
  ends.fill(p.packed);
  if (p.resident)
    for (int l = 0; l < depth; ++l) slots.fill(l, p.packed, l);
  block_barrier();

  const uint32_t patch_mask = (1u << (2 * p.grid.log2_patch)) - 1;
  for (uint32_t begin = block() * kBlockPixels<D>; begin < p.pixels; begin += block_count() * kBlockPixels<D>) {
    const uint32_t first = begin + warp() * (16 * M) + (lane() >> 2);  // the lane's rows: first + 8·i, i < 2·M
    Tile<D> h[M];
    Operand<D> s[M];
    int64_t out[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t k[2], x[2];
      const char* pixel_address[2];
      RowWords<D> cond[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t pixel = first + 16 * m + 8 * r;
        // region: last_pixel_for_missing_ones
        pixel = min(pixel, p.pixels - 1);
        // end region
        const PixelPlace place = locate(p.grid, pixel);
        pixel_address[r] = p.image.at(place);
        out[m][r] = p.velocity.offset(place);
        k[r] = pixel & patch_mask;
        cond[r] = load_row<T, D>(p.cond, pixel);
      }
      load_channels<T>(x, p.image, channels, pixel_address);
      s[m] = silu_operand<T>(cond[0], cond[1]);
      embed<T, D>(h[m], x, ends.pixel(), p.packed.table, k);
    }
#pragma unroll 1
    for (int l = 0; l < depth; ++l) {
      if (!p.resident) {
        // region: refill_of_forward
        block_barrier();
        slots.fill(0, p.packed, l);
        block_barrier();
        // end region
      }
      block_forward<T, D, M>(h, s, slots.block(p.resident ? l : 0, selector), p.eps);
    }
    Operand<D> normalized[M];
    float velocity[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      normalize(h[m], p.eps);
      normalized[m] = rounded<T>(h[m]);
    }
    Linear<T, D, kChannelSlots>(ends.head(), selector).apply(velocity, normalized, 0);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (first + 16 * m + 8 * r < p.pixels)
          store_channels<T>(p.velocity, out[m][r], channels, velocity[m][2 * r], velocity[m][2 * r + 1]);
  }
}

template <class T, int D>
Status run(const Call& call, ForwardParams p) {
  p.resident = shared_bytes<T, D>(p.shape.depth) <= call.limits.shared_bytes;
  const LaunchSize size = {grid_blocks(p.pixels, kBlockPixels<D>, call.limits, 1), kThreads,
                           shared_bytes<T, D>(p.resident ? p.shape.depth : 1)};
  return launch("pixel_decoder_forward", forward_kernel<T, D>, size, call.stream, p);
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
  p.velocity = Planes(op.velocity);
  p.cond = rows_of(op.cond, shape);
  p.grid = patch_grid(shape);
  p.shape = shape;
  p.pixels = static_cast<uint32_t>(shape.pixels());
  p.eps = op.eps;
  const DType operand = op.cond.dtype;
  const Status packed = pack_decoder(call, operand, p.packed, op.weights, shape);
  if (!packed.ok()) return packed;
  return with_kernel(operand, shape.decoder_width,
                     [&](auto type, auto width) { return run<decltype(type), width.value>(call, p); });
}

}  // namespace deco::cuda
