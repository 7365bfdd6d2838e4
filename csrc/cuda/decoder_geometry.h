// Launch parameters that the decoder's kernels derive from a call.
#pragma once

#include <algorithm>

#include "cuda/packed_weights.h"
#include "deco/cuda/pixel_decoder.h"

namespace deco::cuda {

inline int log2_of(int power_of_two) {
  int log2 = 0;
  while ((1 << log2) < power_of_two) ++log2;
  return log2;
}

inline PatchGrid patch_grid(const DecoderShape& shape) {
  PatchGrid grid;
  grid.log2_patch = log2_of(shape.patch_size);
  const int64_t columns = shape.width / shape.patch_size;
  grid.columns = Divider(static_cast<uint32_t>(std::max<int64_t>(1, columns)));
  grid.tokens_per_image =
      Divider(static_cast<uint32_t>(std::max<int64_t>(1, columns * (shape.height / shape.patch_size))));
  return grid;
}

// The rows from pixel `first` on, the first of a token; null if they are.
inline PatchRows rows_of(const PixelRows& rows, const DecoderShape& shape, int64_t first = 0) {
  if (rows.data == nullptr) return {};
  const int log2_pixels = 2 * log2_of(shape.patch_size);
  return {static_cast<uint16_t*>(rows.data) + (first >> log2_pixels) * rows.token_stride, rows.token_stride,
          rows.pixel_stride, log2_pixels};
}
// The same for contiguous rows; null if they are.
inline RowsView contiguous_rows(const PixelRows& rows, const DecoderShape& shape, int64_t first) {
  if (rows.data == nullptr) return {};
  return {static_cast<uint16_t*>(rows.data) + first * shape.decoder_width, shape.decoder_width};
}

// Thread blocks of a persistent grid: one per tile, at most as many as are resident on the device at once.
inline int grid_blocks(int64_t pixels, int pixels_per_block, const DeviceLimits& limits,
                       int blocks_per_multiprocessor) {
  const int64_t tiles = (pixels + pixels_per_block - 1) / pixels_per_block;
  return static_cast<int>(std::min<int64_t>(tiles, int64_t{limits.multiprocessors} * blocks_per_multiprocessor));
}

// Values of an array of operand tiles.
inline int64_t tiled_values(int64_t pixels, int width) { return padded_rows(pixels) * width; }

constexpr int64_t kPixelLimit = int64_t{1} << 31;

// Calls run(T{}, std::integral_constant<int, D>{}) for the compute dtype and the width. DECO_ONLY_WIDTH restricts a
// source to bfloat16 kernels of that width, which compile in a fraction of the time.
template <class Run>
Status with_kernel([[maybe_unused]] DType operand, [[maybe_unused]] int width, Run&& run) {
#ifdef DECO_ONLY_WIDTH
  return run(BFloat16{}, std::integral_constant<int, DECO_ONLY_WIDTH>{});
#else
  const auto with_type = [&](auto type) {
    switch (width) {
      case 16: return run(type, std::integral_constant<int, 16>{});
      case 32: return run(type, std::integral_constant<int, 32>{});
      default: return run(type, std::integral_constant<int, 64>{});
    }
  };
  return operand == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Float16{});
#endif
}

}  // namespace deco::cuda
