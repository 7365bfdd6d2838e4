// The 8x8 blocks of images whose height and width are multiples of 8, for patches of 8x8 or 16x16 pixels. A block lies
// in one patch. Its pixels are in row-major order.
#pragma once

#include "cpu/dct.h"
#include "cpu/decoder_weights.h"
#include "cpu/pixels.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kBlockPixels = kBlock * kBlock;

struct PixelBlock {
  int64_t sample, token, y, x;  // y, x: first row and column in the image
  int index;                    // of the block in its patch
};

// The blocks of a batch, in the order of the tokens.
class BlockGrid {
 public:
  explicit BlockGrid(const DecoderShape& shape)
      : patch_size_(shape.patch_size),
        per_row_(shape.patch_size / kBlock),
        tokens_x_(shape.width / shape.patch_size),
        tokens_y_(shape.height / shape.patch_size),
        count_(shape.pixels() / kBlockPixels) {}

  int64_t count() const { return count_; }

  PixelBlock operator[](int64_t i) const {
    const int per_token = per_row_ * per_row_;
    PixelBlock block;
    block.token = i / per_token;
    block.index = static_cast<int>(i % per_token);
    const int64_t token_row = block.token / tokens_x_;
    block.sample = token_row / tokens_y_;
    block.y = token_row % tokens_y_ * patch_size_ + block.index / per_row_ * kBlock;
    block.x = block.token % tokens_x_ * patch_size_ + block.index % per_row_ * kBlock;
    return block;
  }

 private:
  int patch_size_, per_row_;
  int64_t tokens_x_, tokens_y_, count_;
};

// Order of the pixels of a patch in the table's panels, one panel per block.
struct BlockOrder {
  int patch_size;

  int pixel_at(int place) const {
    const int block = place / kBlockPixels, per_row = patch_size / kBlock;
    const int y = block / per_row * kBlock + place % kBlockPixels / kBlock;
    const int x = block % per_row * kBlock + place % kBlock;
    return y * patch_size + x;
  }
  int place_of(int pixel) const {
    const int y = pixel / patch_size, x = pixel % patch_size;
    const int block = y / kBlock * (patch_size / kBlock) + x / kBlock;
    return block * kBlockPixels + y % kBlock * kBlock + x % kBlock;
  }
};

// Addresses of the block's rows of D values in `rows`.
template <class Pointer>
inline void row_addresses(const PixelRows& rows, const PixelBlock& block, BlockOrder order,
                          Pointer (&addresses)[kBlockPixels]) {
  const int64_t bytes = size_of(rows.dtype);
  char* token = static_cast<char*>(rows.data) + block.token * rows.token_stride * bytes;
  for (int i = 0; i < kBlockPixels; ++i)
    addresses[i] = token + order.pixel_at(block.index * kBlockPixels + i) * rows.pixel_stride * bytes;
}

// Offset of row y of the block's channel c in the image, in elements.
inline int64_t row_offset(const ImageArray& image, const PixelBlock& block, int c, int y) {
  return block.sample * image.stride_b + c * image.stride_c + (block.y + y) * image.stride_y + block.x * image.stride_x;
}

// planes[c] = channel c of the block's pixels.
inline void gather_block(const ImageArray& image, const PixelBlock& block, int channels,
                         float (*planes)[kBlockPixels]) {
  with_dtype(image.dtype, [&](auto dtype) {
    for (int c = 0; c < channels; ++c)
      for (int y = 0; y < kBlock; ++y) {
        const int64_t offset = row_offset(image, block, c, y);
        for (int x = 0; x < kBlock; ++x)
          planes[c][y * kBlock + x] = load_scalar(image.data, dtype, offset + x * image.stride_x);
      }
  });
}

// Inverse of gather_block.
inline void scatter_block(const ImageArray& image, const PixelBlock& block, int channels,
                          const float (*planes)[kBlockPixels]) {
  with_dtype(image.dtype, [&](auto dtype) {
    for (int c = 0; c < channels; ++c)
      for (int y = 0; y < kBlock; ++y) {
        const int64_t offset = row_offset(image, block, c, y);
        for (int x = 0; x < kBlock; ++x)
          store_scalar(image.data, dtype, offset + x * image.stride_x, planes[c][y * kBlock + x]);
      }
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
