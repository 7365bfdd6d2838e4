// Recompute of the decoder's forward for its backward, then the backward of the head (formula in
// decoder_backward_kernels.h). Grid, ownership and shared memory are those of pixel_decoder.cu; the inputs of the
// decoder blocks, SiLU(cond) and the gradient of h_N are written as operand tiles. Per pixel: reads 2·D bytes of cond
// and 2·C image values, writes 2·D·(N + 2) bytes. Deterministic: the gradient of the head is summed per thread block in
// a fixed order.
#include "cuda/block.h"
#include "cuda/decoder_backward_kernels.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

namespace {

constexpr int kThreads = 256;
template <int D>
constexpr int kTiles = D <= 32 ? 2 : 1;  // per warp
template <int D>
constexpr int kBlockPixels = kThreads / 32 * kTilePixels * kTiles<D>;

struct RecomputeParams {
  DecoderRecompute op;
  PatchGrid grid;
  uint32_t first_pixel = 0, pixels = 0;
  int64_t rows = 0;  // padded_rows(pixels): pixels per array of operand tiles
  int parts = 0;
  bool resident = false;

  template <class V>
  void visit(V& buffers) const {
    const DecoderShape& shape = op.shape;
    const int width = shape.decoder_width;
    op.packed.visit(buffers, false, shape.depth, width, kBlockMatrices, shape.pixels_per_token());
    op.image.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    op.grad_velocity.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    op.cond.visit(buffers, pixels, width);
    buffers.write(op.h_tiles, int64_t{2} * shape.depth * rows * width);
    buffers.write(op.s_tiles, int64_t{2} * rows * width);
    buffers.write(op.grad_h_tiles, int64_t{2} * rows * width);
    buffers.write(op.partials, int64_t{4} * parts * (width + 1) * kChannelSlots);
  }
};

template <class T, int D>
int shared_bytes(int slots) {
  const int sums = kThreads / 32 * ChannelGradient<T, D>::kNumbers * 4;
  return std::max(DecoderEnds<T, D>::kBytes + slots * BlockSlots<T, D>::kBytes, sums);
}

// Gradient of the input of the head's LayerNorm; x is the gradient of the velocity as a left operand.
template <class T, int D>
DECO_DEVICE Tile<D> head_backward(const uint32_t (&x)[2], const Tile<D>& normalized, RowPair rstd, const T* head) {
  Tile<D> grad, result = zeros<D>();
#pragma unroll
  for (int i = 0; i < D; i += 32) {
    uint32_t w[4];  // four column tiles; at D = 16 two, repeated
    load_matrices_transposed(w, head + (lane() & 7) * kRowStride<D> + ((i + (lane() & ~7)) & (D - 1)));
#pragma unroll
    for (int j = 0; j < 4 && 8 * j < D; ++j) {
      const float zero[4] = {0, 0, 0, 0};
      multiply<T>(grad.v[i / 8 + j], x, w[j], zero);
    }
  }
  add_normalize_gradient(result, grad, normalized, rstd);
  return result;
}

template <class T, int D>
DECO_KERNEL(kThreads, 1, recompute_kernel, const RecomputeParams p) {
  constexpr int M = kTiles<D>;
  const DecoderRecompute& op = p.op;
  const DecoderEnds<T, D> ends{shared_memory()};
  const BlockSlots<T, D> slots{shared_memory() + DecoderEnds<T, D>::kBytes};
  const int depth = op.shape.depth, channels = op.shape.channels;
  const uint32_t selector = bias_selector<T>();
  wait_for_previous_kernel();
  ends.fill(op.packed);
  if (p.resident)
    for (int l = 0; l < depth; ++l) slots.fill(l, op.packed, l);
  block_barrier();

  ChannelGradient<T, D> head_gradient;
  head_gradient.clear();
  const uint32_t patch_mask = (1u << (2 * p.grid.log2_patch)) - 1, end = p.pixels - 1;
  for (uint32_t begin = block() * kBlockPixels<D>; begin < p.pixels; begin += block_count() * kBlockPixels<D>) {
    const uint32_t tile = begin / kTilePixels + warp() * M, first = tile * kTilePixels + (lane() >> 2);
    Tile<D> h[M];
    Operand<D> s[M];
    uint32_t grad_velocity[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t k[2], x[2];
      const char *pixel_address[2], *grad_address[2];
      RowWords<D> cond[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t pixel = min(first + kTilePixels * m + 8 * r, end);
        const PixelPlace place = locate(p.grid, p.first_pixel + pixel);
        pixel_address[r] = op.image.at(place);
        grad_address[r] = op.grad_velocity.at(place);
        k[r] = pixel & patch_mask;
        cond[r] = load_row<T, D>(op.cond, pixel);
      }
      load_channels<T>(x, op.image, channels, pixel_address);
      load_channels<T>(grad_velocity[m], op.grad_velocity, channels, grad_address);
      s[m] = silu_operand<T>(cond[0], cond[1]);
      embed<T, D>(h[m], x, ends.pixel(), op.packed.table, k);
      store_tile<D>(op.s_tiles, tile + m, s[m]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t pixel = first + kTilePixels * m + 8 * r;
        grad_velocity[m][r] = pixel <= end ? grad_velocity[m][r] : 0u;
      }
    }
#pragma unroll 1
    for (int l = 0; l < depth; ++l) {
      if (!p.resident) {
        // region: refill_of_recompute
        block_barrier();
        slots.fill(0, op.packed, l);
        block_barrier();
        // end region
      }
      void* h_tiles = static_cast<T*>(op.h_tiles) + l * (p.rows * D);
#pragma unroll
      for (int m = 0; m < M; ++m) store_tile<D>(h_tiles, tile + m, rounded<T>(h[m]));
      block_forward<T, D, M>(h, s, slots.block(p.resident ? l : 0, selector), op.eps);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const RowPair rstd = normalize(h[m], op.eps);
      if (op.partials != nullptr) head_gradient.add(rounded<T>(h[m]), grad_velocity[m]);
      const Tile<D> grad_h = head_backward<T, D>(grad_velocity[m], h[m], rstd, ends.head());
      store_tile<D>(op.grad_h_tiles, tile + m, rounded<T>(grad_h));
    }
  }
  if (op.partials != nullptr)
    head_gradient.write(op.partials + int64_t{block()} * head_gradient.kNumbers,
                        reinterpret_cast<float*>(shared_memory()), op.accumulate);
}

template <class T, int D>
Status run(const Call& call, RecomputeParams p) {
  p.resident = shared_bytes<T, D>(p.op.shape.depth) <= call.limits.shared_bytes;
  return launch("pixel_decoder_recompute", recompute_kernel<T, D>,
                {p.parts, kThreads, shared_bytes<T, D>(p.resident ? p.op.shape.depth : 1), true}, call.stream, p);
}

}  // namespace

int decoder_recompute_parts(const DeviceLimits& limits, int width, int64_t pixels) {
  return grid_blocks(pixels, width <= 32 ? kBlockPixels<32> : kBlockPixels<64>, limits, 1);
}

Status decoder_recompute(const Call& call, DType operand, const DecoderRecompute& op) {
  RecomputeParams p;
  p.op = op;
  p.grid = patch_grid(op.shape);
  p.first_pixel = static_cast<uint32_t>(op.first_pixel);
  p.pixels = static_cast<uint32_t>(op.pixels);
  p.rows = padded_rows(op.pixels);
  p.parts = decoder_recompute_parts(call.limits, op.shape.decoder_width, op.pixels);
  return with_kernel(operand, op.shape.decoder_width,
                     [&](auto type, auto width) { return run<decltype(type), width.value>(call, p); });
}

}  // namespace deco::cuda
