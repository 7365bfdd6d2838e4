// Backward of the decoder's embedding (formula in decoder_kernels.h). Persistent grid; a warp owns tiles of 16 pixels and
// loads the next one before it computes the present one. All tiles of a thread block are at the same positions of the
// patch, so that it sums the gradients of its rows of the pixel table in registers, then over its warps. The packed
// weights are in shared memory. Per pixel: reads 2·D bytes and C image values, writes C values and, if wanted, 2·D bytes
// of the query's gradient; 6·C·D FLOPs. Deterministic: sums are written per thread block and added in a fixed order.
#include "cuda/block.h"
#include "cuda/decoder_kernels.h"
#include "cuda/gradient_sums.h"
#include "cuda/warp_pixels.h"

namespace deco::cuda {

namespace {

// As many as registers allow: the next tiles of all warps are the loads in flight that hide the latency of memory.
constexpr int blocks_per_multiprocessor(int width) { return width == 16 ? 4 : width == 32 ? 3 : 2; }

struct EmbeddingParams {
  DecoderEmbedding op;
  PixelRange range;
  int parts = 0;
  int table_rows = 0;  // per thread block: min(P, 16)
  RowsView grad_query;

  template <class V>
  void visit(V& buffers) const {
    const DecoderShape& shape = op.shape;
    const int width = shape.decoder_width;
    op.packed.visit(buffers, false, shape.depth, width, kBlockMatrices, shape.pixels_per_token());
    op.image.visit(buffers, false, shape.batch, shape.channels, shape.height, shape.width);
    op.grad_image.visit(buffers, true, shape.batch, shape.channels, shape.height, shape.width);
    grad_query.visit(buffers, true, range.count, width);
    buffers.read(op.grad_h_tiles, 2 * tiled_values(range.count, width));
    buffers.write(op.partials, int64_t{4} * parts * (width + 1) * kChannelSlots);
    buffers.write(op.table_partials, int64_t{4} * parts * table_rows * width);
  }
};

// What a warp reads of a tile.
template <int D>
struct TileInputs {
  Operand<D> grad_h;
  StoredChannels<1> x;
};

// Writes channels 2t, 2t + 1 of the lane's two rows of a tile; only lanes with t < 2 hold channels.
template <class Pixels>
DECO_DEVICE void store_channels(const Pixels& pixels, const ChannelAddresses<1>& address, DType dtype, int channels,
                                const float (&v)[4]) {
  const int channel = 2 * (lane() & 3);
  const auto store_each = [&](auto&& store_one) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (channel + i % 2 < channels && pixels.exists(i / 2)) store_one(address.row[i / 2][i % 2], i);
  };
  if (dtype == DType::kFloat32) return store_each([&](char* to, int i) { store(reinterpret_cast<float*>(to), v[i]); });
  uint32_t words[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float v0 = v[2 * r], v1 = v[2 * r + 1];
    words[r] = dtype == DType::kBFloat16 ? pack<BFloat16>(v0, v1) : pack<Float16>(v0, v1);
  }
  store_each([&](char* to, int i) {
    store(reinterpret_cast<uint16_t*>(to), static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
  });
}

// Adds the sums of the rows of all warps and writes them; rows at the same position of the patch are added. Called by
// all threads.
template <int D>
DECO_DEVICE void write_table(const Tile<D>& sum, float* rows, float* shared, int table_rows, bool accumulate) {
  const int g = lane() >> 2, t = lane() & 3;
  float* own = shared + warp() * table_rows * D;
  block_barrier();
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float upper = sum.v[j][e], lower = sum.v[j][2 + e];
      if (table_rows < kTilePixels) upper += lower;
      for (int row = table_rows; row < 8; row *= 2) upper += shuffle_xor(upper, 4 * row);
      const auto put = [&](int row, float value) { store(own + row * D + (D / 4) * t + 2 * j + e, value); };
      if (g < table_rows) put(g, upper);
      if (table_rows == kTilePixels) put(g + 8, lower);
    }
  block_barrier();
  write_sums_of_warps(rows, shared, table_rows * D, accumulate);
}

// Thread blocks whose tiles are at different positions of the patch.
DECO_HOST_DEVICE int positions_of(int pixels_per_token) {
  return pixels_per_token > kTilePixels ? pixels_per_token / kTilePixels : 1;
}

template <class T, int D, bool General, bool Extended>
DECO_KERNEL(kThreads, blocks_per_multiprocessor(D), embedding_kernel, const EmbeddingParams p) {
  using Pixels = WarpPixels<1, General>;
  const DecoderEmbedding& op = p.op;
  const DecoderEnds<T, D> ends{shared_memory()};
  char* lanes = shared_memory() + DecoderEnds<T, D>::kBytes;
  const int channels = op.shape.channels, channel = 2 * (lane() & 3);  // of grad_image
  wait_for_previous_kernel();
  ends.fill(op.packed);
  const auto of_image =
      Pixels::lane_of(p.range, op.image, image_channel(0, channels), image_channel(1, channels), lanes);
  const auto of_gradient = Pixels::lane_of(p.range, op.grad_image, channel, channel + 1, lanes + kLaneBytes);
  block_barrier();
  ChannelGradient<T, D> pixel_gradient;
  pixel_gradient.clear();
  Tile<D> table_sum = zeros<D>();
  const bool sums = op.partials != nullptr, is_float32 = op.image.dtype == DType::kFloat32;

  const int positions = positions_of(1 << (2 * p.range.grid.log2_patch));
  const uint32_t own = (block() / positions * kWarps + warp()) * positions + block() % positions;
  const uint32_t turn = block_count() * kWarps * kTilePixels;
  uint32_t first = own * kTilePixels;
  Pixels next_pixels(p.range, first);
  TileInputs<D> next{};
  const auto load_next = [&](uint32_t pixel) {
    next_pixels = Pixels(p.range, pixel);
    next.grad_h = load_tile<D>(op.grad_h_tiles, pixel / kTilePixels);
    if (sums) next.x = load_stored(next_pixels.addresses(op.image, of_image), is_float32);
  };
  if (first < p.range.count) load_next(first);
  for (; first < p.range.count; first += turn) {
    const Pixels pixels = next_pixels;
    auto [grad_h, stored_x] = next;
    // After the last tile the same again, from a cache: a branch around the loads would cost registers in every turn.
    load_next(first + turn < p.range.count ? first + turn : first);
    pixels.clear_missing(grad_h);
    if constexpr (Extended) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (pixels.exists(r)) store_row<T>(p.grad_query, first + (lane() >> 2) + 8 * r, row_of(grad_h, r));
    }
    if (sums) {
      uint32_t x[1][2];
      channel_words<T>(x, stored_x, is_float32);
      pixel_gradient.add(grad_h, x[0]);
      const Tile<D> tile = tile_of<T>(grad_h);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) table_sum.v[j][i] += tile.v[j][i];
    }
    if (op.grad_image.data != nullptr) {
      float grad[4] = {0, 0, 0, 0};
      multiply_add<T, D>(grad, grad_h, weight_columns<T, D>(ends.pixel(), kChannelSlots));
      store_channels(pixels, pixels.addresses(op.grad_image, of_gradient), op.grad_image.dtype, channels, grad);
    }
  }
  if (!sums) return;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  write_table<D>(table_sum, op.table_partials + int64_t{block()} * p.table_rows * D, shared, p.table_rows,
                 op.accumulate);
  pixel_gradient.write(op.partials + int64_t{block()} * pixel_gradient.kNumbers, shared, op.accumulate);
}

template <class T, int D, bool Extended>
Status run(const Call& call, const EmbeddingParams& p) {
  const DecoderShape& s = p.op.shape;
  const int sums = std::max(ChannelGradient<T, D>::kNumbers, p.table_rows * D);
  const int shared = std::max(DecoderEnds<T, D>::kBytes + 2 * kLaneBytes, kWarps * sums * 4);
  const int64_t of_image = p.op.image.bytes(s.batch, s.channels, s.height, s.width);
  const int64_t of_gradient = p.op.grad_image.bytes(s.batch, s.channels, s.height, s.width);
  return with_pixels<1>(s, {of_image, of_gradient}, [&](auto general) {
    return launch("pixel_decoder_embedding", embedding_kernel<T, D, general.value, Extended>,
                  {p.parts, kThreads, shared, true}, call.stream, p);
  });
}

// ---- the pixel table ------------------------------------------------------------------------------------------------

struct TableParams {
  Array grad_table;
  const float* partials = nullptr;
  int width = 0, pixels_per_token = 0, parts = 0;

  template <class V>
  void visit(V& buffers) const {
    buffers.write(grad_table.data, int64_t{width} * pixels_per_token * size_of(grad_table.dtype));
    buffers.read(partials, int64_t{4} * parts * std::min(pixels_per_token, kTilePixels) * width);
  }
};

// A thread block sums one row of the table over the parts that have it: in slices of `width` threads, then the slices in
// order.
DECO_KERNEL(kThreads, 1, table_kernel, const TableParams p) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int k = block(), rows = min(p.pixels_per_token, kTilePixels), positions = positions_of(p.pixels_per_token);
  const int channel = thread() % p.width, slice = thread() / p.width, slices = block_threads() / p.width;
  float sum = 0.0f;
  for (int part = k / rows + positions * slice; part < p.parts; part += positions * slices)
    sum += load(p.partials + (int64_t{part} * rows + k % rows) * p.width + channel);
  store(shared + thread(), sum);
  block_barrier();
  if (slice > 0) return;
  float total = 0.0f;
  for (int s = 0; s < slices; ++s) total += load(shared + s * p.width + channel);
  store_float(p.grad_table, int64_t{k} * p.width + channel, total);
}

}  // namespace

int decoder_embedding_parts(const DeviceLimits& limits, const DecoderShape& shape, int64_t pixels) {
  // As many thread blocks for every position.
  const int positions = positions_of(shape.pixels_per_token());
  const int parts = grid_blocks(pixels, kWarps * kTilePixels, limits, blocks_per_multiprocessor(shape.decoder_width));
  return std::max(1, parts / positions) * positions;
}

int64_t decoder_embedding_table_numbers(const DeviceLimits& limits, const DecoderShape& shape, int64_t pixels) {
  return int64_t{decoder_embedding_parts(limits, shape, pixels)} * std::min(shape.pixels_per_token(), kTilePixels) *
         shape.decoder_width;
}

Status decoder_embedding(const Call& call, DType operand, const DecoderEmbedding& op, const RowsView& grad_query) {
  EmbeddingParams p;
  p.op = op;
  p.range = {patch_grid(op.shape), static_cast<uint32_t>(op.first_pixel), static_cast<uint32_t>(op.pixels)};
  p.parts = decoder_embedding_parts(call.limits, op.shape, op.pixels);
  p.table_rows = std::min(op.shape.pixels_per_token(), kTilePixels);
  p.grad_query = grad_query;
  return with_kernel(operand, op.shape.decoder_width, [&](auto type, auto width) {
    return with_extension(grad_query.data != nullptr,
                          [&](auto extended) { return run<decltype(type), width.value, extended.value>(call, p); });
  });
}

Status sum_table_partials(const Call& call, const Array& grad_table, const float* table_partials,
                          const DecoderShape& shape, int64_t pixels) {
  TableParams p;
  p.grad_table = grad_table;
  p.partials = table_partials;
  p.width = shape.decoder_width;
  p.pixels_per_token = shape.pixels_per_token();
  p.parts = decoder_embedding_parts(call.limits, shape, pixels);
  return launch("pixel_table_gradient", table_kernel, {shape.pixels_per_token(), kThreads, kThreads * 4}, call.stream,
                p);
}

}  // namespace deco::cuda
