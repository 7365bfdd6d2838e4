// Addresses of a tile's pixels in images and in rows of cond. Row r of cond is pixel k = r mod P of token r / P;
// pixel k = ky*p + kx of token (b, ty, tx) is image pixel (b, ty*p + ky, tx*p + kx).
#pragma once

#include "cpu/rows.h"
#include "deco/pixel_decoder.h"

namespace deco::cpu::DECO_CPU_ISA {

// Iterator over rows of cond in order. A run is part of one row of a patch; its pixels are adjacent in the image.
class PixelWalk {
 public:
  PixelWalk(const DecoderShape& shape, int64_t row)
      : patch_size_(shape.patch_size),
        tokens_x_(shape.width / shape.patch_size),
        tokens_y_(shape.height / shape.patch_size) {
    const int64_t pixels = shape.pixels_per_token(), token = row / pixels;
    const int pixel = static_cast<int>(row - token * pixels);
    kernel_y_ = pixel / patch_size_;
    kernel_x_ = pixel % patch_size_;
    token_x_ = token % tokens_x_;
    token_y_ = token / tokens_x_ % tokens_y_;
    image_ = token / tokens_x_ / tokens_y_;
  }

  // Number of rows from here on that are adjacent in the image, at most `limit`.
  int run_length(int limit) const {
    const int left = patch_size_ - kernel_x_;
    return left < limit ? left : limit;
  }

  int64_t offset_in(const ImageArray& image) const {
    return image_ * image.stride_b + (token_y_ * patch_size_ + kernel_y_) * image.stride_y +
           (token_x_ * patch_size_ + kernel_x_) * image.stride_x;
  }

  void advance(int run) {
    kernel_x_ += run;
    if (kernel_x_ < patch_size_) return;
    kernel_x_ = 0;
    if (++kernel_y_ < patch_size_) return;
    kernel_y_ = 0;
    advance_token();
  }

  // Moves to the same pixel of the next token.
  void advance_token() {
    if (++token_x_ < tokens_x_) return;
    token_x_ = 0;
    if (++token_y_ < tokens_y_) return;
    token_y_ = 0;
    ++image_;
  }

 private:
  int patch_size_;
  int64_t tokens_x_, tokens_y_;
  int kernel_y_, kernel_x_;
  int64_t token_y_, token_x_, image_;
};

// planes[c][i] = channel c of the pixel of row first_row + i for i < count. The other places of a tile of whole tokens
// repeat its last token: a row of zeros has variance 0, and rstd would be infinite at eps = 0.
template <int T>
inline void gather_pixels(const DecoderShape& shape, const ImageArray& image, int64_t first_row, int count,
                          float (*planes)[T]) {
  with_dtype(image.dtype, [&](auto dtype) {
    PixelWalk walk(shape, first_row);
    for (int i = 0; i < count;) {
      const int run = walk.run_length(count - i);
      for (int c = 0; c < shape.channels; ++c) {
        const int64_t offset = walk.offset_in(image) + c * image.stride_c;
        for (int j = 0; j < run; ++j) planes[c][i + j] = load_scalar(image.data, dtype, offset + j * image.stride_x);
      }
      walk.advance(run);
      i += run;
    }
  });
  for (int c = 0; c < shape.channels; ++c)
    for (int i = count; i < T; ++i) planes[c][i] = planes[c][i - shape.pixels_per_token()];
}

// The places of gather_pixels behind the tile's pixels become zero, so that they add nothing to sums over the tile.
template <int T>
inline void clear_missing(int channels, int count, float (*planes)[T]) {
  for (int c = 0; c < channels; ++c)
    for (int i = count; i < T; ++i) planes[c][i] = 0.0f;
}

// Inverse of gather_pixels: writes the first `count` pixels of the planes.
template <int T>
inline void scatter_pixels(const DecoderShape& shape, const ImageArray& image, int64_t first_row, int count,
                           const float (*planes)[T]) {
  with_dtype(image.dtype, [&](auto dtype) {
    PixelWalk walk(shape, first_row);
    for (int i = 0; i < count;) {
      const int run = walk.run_length(count - i);
      for (int c = 0; c < shape.channels; ++c) {
        const int64_t offset = walk.offset_in(image) + c * image.stride_c;
        for (int j = 0; j < run; ++j) store_scalar(image.data, dtype, offset + j * image.stride_x, planes[c][i + j]);
      }
      walk.advance(run);
      i += run;
    }
  });
}

// planes[c][i] = channel c of pixel `pixel` of token first_token + i for i < count, 0 for i >= count.
template <int T>
inline void gather_token_pixels(const DecoderShape& shape, const ImageArray& image, int64_t first_token, int pixel,
                                int count, float (*planes)[T]) {
  with_dtype(image.dtype, [&](auto dtype) {
    PixelWalk walk(shape, first_token * shape.pixels_per_token() + pixel);
    for (int i = 0; i < count; ++i, walk.advance_token())
      for (int c = 0; c < shape.channels; ++c)
        planes[c][i] = load_scalar(image.data, dtype, walk.offset_in(image) + c * image.stride_c);
  });
  for (int c = 0; c < shape.channels; ++c)
    for (int i = count; i < T; ++i) planes[c][i] = 0.0f;
}

// Inverse of gather_token_pixels: writes pixel `pixel` of the first `count` tokens.
template <int T>
inline void scatter_token_pixels(const DecoderShape& shape, const ImageArray& image, int64_t first_token, int pixel,
                                 int count, const float (*planes)[T]) {
  with_dtype(image.dtype, [&](auto dtype) {
    PixelWalk walk(shape, first_token * shape.pixels_per_token() + pixel);
    for (int i = 0; i < count; ++i, walk.advance_token())
      for (int c = 0; c < shape.channels; ++c)
        store_scalar(image.data, dtype, walk.offset_in(image) + c * image.stride_c, planes[c][i]);
  });
}

constexpr int kMaxRowBytes = 64 * sizeof(float);         // a row of cond or h at D = 64
alignas(64) constexpr char kZeroRow[kMaxRowBytes] = {};  // source of the padding rows of the last tile

// addresses[i] = address of row first_row + i for i < count; the other places repeat rows as in gather_pixels.
template <int T, class Pointer>
inline void row_addresses(const DecoderShape& shape, const PixelRows& rows, int64_t first_row, int count,
                          Pointer (&addresses)[T]) {
  const int64_t bytes = size_of(rows.dtype), pixels = shape.pixels_per_token();
  char* data = static_cast<char*>(rows.data);
  int64_t token = first_row / pixels, pixel = first_row % pixels;
  for (int i = 0; i < T; ++i) {
    addresses[i] =
        i < count ? data + (token * rows.token_stride + pixel * rows.pixel_stride) * bytes : addresses[i - pixels];
    if (++pixel == pixels) {
      pixel = 0;
      ++token;
    }
  }
}

// addresses[i] = address of row first_row + i for i < count, `padding` for i >= count.
template <int T, class Pointer>
inline void row_addresses(const Rows& rows, int64_t first_row, int count, Pointer padding, Pointer (&addresses)[T]) {
  const int64_t bytes = rows.stride * size_of(rows.dtype);
  char* first = static_cast<char*>(rows.data) + first_row * bytes;
  for (int i = 0; i < T; ++i) addresses[i] = i < count ? first + i * bytes : padding;
}

// Prefetches rows first_row .. first_row + T - 1 of D values, up to the last row. Always inlined (rows.h).
template <int D, int T>
DECO_INLINE void prefetch_rows(const DecoderShape& shape, const PixelRows& rows, int64_t first_row) {
  const int64_t left = shape.pixels() - first_row;
  if (left <= 0) return;  // no row to repeat
  const char* addresses[T];
  row_addresses<T, const char*>(shape, rows, first_row, static_cast<int>(left < T ? left : T), addresses);
  prefetch_rows<D>(rows.dtype, addresses, 0, 1);
}

}  // namespace deco::cpu::DECO_CPU_ISA
