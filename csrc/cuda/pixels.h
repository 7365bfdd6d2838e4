// Addresses of a pixel's values: rows of channels in token order, and elements of images [B, C, H, W] with any strides.
//
// Pixels are numbered in token order: pixel k = ky·p + kx of token T, P = p², has number T·P + k.
#pragma once

#include "cuda/tile.h"
#include "deco/array.h"

namespace deco::cuda {

// ---- any dtype ------------------------------------------------------------------------------------------------------

DECO_DEVICE float load_float(const void* address, DType dtype) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(address));
  const uint32_t bits = load(static_cast<const uint16_t*>(address));
  return dtype == DType::kBFloat16 ? low<BFloat16>(bits) : low<Float16>(bits);
}
DECO_DEVICE float load_float(const Array& array, int64_t index) {
  return load_float(static_cast<const char*>(array.data) + index * (array.dtype == DType::kFloat32 ? 4 : 2),
                    array.dtype);
}
DECO_DEVICE void store_float(const Array& array, int64_t index, float value) {
  if (array.dtype == DType::kFloat32)
    store(static_cast<float*>(array.data) + index, value);
  else
    store(static_cast<uint16_t*>(array.data) + index,
          static_cast<uint16_t>(array.dtype == DType::kBFloat16 ? pack<BFloat16>(value, 0) : pack<Float16>(value, 0)));
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// [tokens, P, D] of the compute dtype with unit channel stride; the other strides are in elements.
struct PatchRows {
  void* data = nullptr;
  int64_t token_stride = 0, pixel_stride = 0;
  int log2_pixels = 0;  // log2(P)

  // Address of channel `channel` of a pixel.
  template <class T>
  DECO_DEVICE T* at(uint32_t pixel, int channel) const {
    const uint32_t token = pixel >> log2_pixels, k = pixel & ((1u << log2_pixels) - 1);
    return static_cast<T*>(data) + (token * token_stride + k * pixel_stride + channel);
  }

  // Size of the rows of `pixels` pixels.
  int64_t bytes(int64_t pixels, int width) const {
    if (data == nullptr || pixels == 0) return 0;
    const int64_t tokens = (pixels + (int64_t{1} << log2_pixels) - 1) >> log2_pixels;
    const int64_t in_token = (int64_t{1} << log2_pixels) - 1;
    return 2 * ((tokens - 1) * token_stride + in_token * pixel_stride + width);
  }
  // Declares them as read.
  template <class V>
  void visit(V& buffers, int64_t pixels, int width) const {
    buffers.read(data, bytes(pixels, width));
  }
};

// [pixels, D] of the compute dtype with unit channel stride; the stride between pixels is in elements.
struct RowsView {
  void* data = nullptr;
  int64_t stride = 0;

  RowsView() = default;
  DECO_HOST_DEVICE RowsView(void* memory, int64_t elements) : data(memory), stride(elements) {}
  explicit RowsView(const Rows& rows) : data(rows.data), stride(rows.stride) {}

  template <class T>
  DECO_DEVICE T* at(uint32_t pixel, int channel) const {
    return static_cast<T*>(data) + (pixel * stride + channel);
  }

  template <class V>
  void visit(V& buffers, bool write, int64_t pixels, int width) const {
    if (data == nullptr || pixels == 0) return;
    const int64_t bytes = 2 * ((pixels - 1) * stride + width);
    write ? buffers.write(data, bytes) : buffers.read(data, bytes);
  }
};

// A lane's quarter of a row, one word per column tile.
template <int D>
struct RowWords {
  uint32_t word[D / 8];
};

// The lane's first channel of a row.
template <int D>
DECO_DEVICE int lane_channel() {
  return (D / 4) * (lane() & 3);
}

// The lane's quarter of a row, in pieces of up to 16 bytes, `step` pieces apart from `address` on.
template <int D>
DECO_DEVICE RowWords<D> load_row(const void* address, [[maybe_unused]] int step = 1) {
  RowWords<D> row;
  if constexpr (D == 16) {
    const Words2 words = load(static_cast<const Words2*>(address));
    row.word[0] = words.x;
    row.word[1] = words.y;
  } else {
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const Words4 words = load(static_cast<const Words4*>(address) + i * step);
      row.word[4 * i] = words.x;
      row.word[4 * i + 1] = words.y;
      row.word[4 * i + 2] = words.z;
      row.word[4 * i + 3] = words.w;
    }
  }
  return row;
}
template <class T, int D, class AnyRows>
DECO_DEVICE RowWords<D> load_row(const AnyRows& rows, uint32_t pixel) {
  return load_row<D>(rows.template at<T>(pixel, lane_channel<D>()));
}

template <class T, int D>
DECO_DEVICE void store_row(const RowsView& rows, uint32_t pixel, const RowWords<D>& row) {
  T* address = rows.at<T>(pixel, lane_channel<D>());
  if constexpr (D == 16) {
    store_global(reinterpret_cast<Words2*>(address), Words2{row.word[0], row.word[1]});
  } else {
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
      store_global(reinterpret_cast<Words4*>(address) + i,
                   Words4{row.word[4 * i], row.word[4 * i + 1], row.word[4 * i + 2], row.word[4 * i + 3]});
  }
}

// ---- operand tiles --------------------------------------------------------------------------------------------------

// Global scratch memory [tiles of 16 pixels][D / 16][lanes][4 words]: left operands (tile.h) in their register layout.
// A warp moves 512 bytes per access, and matmuls use the words without shuffles.
template <int D>
constexpr int kTileWords = D / 16 * 32;  // of 16 bytes

template <int D>
DECO_DEVICE Operand<D> load_tile(const void* tiles, uint32_t tile) {
  Operand<D> operand;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const Words4 words = load(static_cast<const Words4*>(tiles) + (int64_t{tile} * kTileWords<D> + 32 * k + lane()));
    operand.k_step[k][0] = words.x;
    operand.k_step[k][1] = words.y;
    operand.k_step[k][2] = words.z;
    operand.k_step[k][3] = words.w;
  }
  return operand;
}
// Where a lane writes a tile.
template <int D>
DECO_DEVICE Words4* lane_words(void* tiles, uint32_t tile) {
  return static_cast<Words4*>(tiles) + (int64_t{tile} * kTileWords<D> + lane());
}
template <int D>
DECO_DEVICE void store_tile(Words4* words, const Operand<D>& operand) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    store_global(words + 32 * k,
                 Words4{operand.k_step[k][0], operand.k_step[k][1], operand.k_step[k][2], operand.k_step[k][3]});
}

// ---- images ---------------------------------------------------------------------------------------------------------

// Division by a divisor known at launch, by multiplication and shift; exact for dividends below 2^31.
struct Divider {
  uint32_t divisor = 1, multiplier = 0;
  int shift = 0;

  Divider() = default;
  explicit Divider(uint32_t by) : divisor(by) {
    int log2 = 0;
    while ((uint64_t{1} << log2) < by) ++log2;
    shift = 31 + log2;
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / by + 1);
  }
  DECO_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
};

// The patches of a batch of images with fewer than 2^31 pixels in total.
struct PatchGrid {
  int log2_patch = 0;
  Divider tokens_per_image, columns;

  // The bits of a pixel's number that are its number in its token.
  DECO_DEVICE uint32_t pixel_mask() const { return (1u << (2 * log2_patch)) - 1; }
};

struct PixelPlace {
  uint32_t image, y, x;
};

DECO_DEVICE PixelPlace locate(const PatchGrid& grid, uint32_t pixel) {
  const int log2_patch = grid.log2_patch;
  const uint32_t token = pixel >> (2 * log2_patch), k = pixel & grid.pixel_mask();
  const uint32_t image = grid.tokens_per_image.quotient(token);
  const uint32_t in_image = token - image * grid.tokens_per_image.divisor;
  const uint32_t row = grid.columns.quotient(in_image), column = in_image - row * grid.columns.divisor;
  return {image, (row << log2_patch) + (k >> log2_patch), (column << log2_patch) + (k & ((1u << log2_patch) - 1))};
}

// An image [B, C, H, W] with strides in bytes.
struct Image {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride_b = 0, stride_c = 0, stride_y = 0, stride_x = 0;

  Image() = default;
  explicit Image(const ImageArray& array)
      : data(static_cast<char*>(array.data)),
        dtype(array.dtype),
        stride_b(array.stride_b * size_of(array.dtype)),
        stride_c(array.stride_c * size_of(array.dtype)),
        stride_y(array.stride_y * size_of(array.dtype)),
        stride_x(array.stride_x * size_of(array.dtype)) {}

  DECO_DEVICE char* at(const PixelPlace& place, int channel = 0) const {
    return data + (place.image * stride_b + place.y * stride_y + place.x * stride_x + channel * stride_c);
  }
  int64_t bytes(int64_t batch, int64_t channels, int64_t height, int64_t width) const {
    if (data == nullptr || batch == 0) return 0;
    return (batch - 1) * stride_b + (channels - 1) * stride_c + (height - 1) * stride_y + (width - 1) * stride_x +
           size_of(dtype);
  }
  template <class V>
  void visit(V& buffers, bool write, int64_t batch, int64_t channels, int64_t height, int64_t width) const {
    const int64_t size = bytes(batch, channels, height, width);
    write ? buffers.write(data, size) : buffers.read(data, size);
  }
};

// Channel of an image at which a lane starts (c = 0) and the next one (c = 1). Missing channels repeat another channel;
// their weights are zero.
DECO_DEVICE int image_channel(int c, int channels) { return min(2 * (lane() & 1) + c, channels - 1); }

// Of a lane's two channels in each row of M tiles.
template <int M>
struct ChannelAddresses {
  char* row[2 * M][2];
};

// A lane's word of the left operand (16 pixels x 8) of a tile with up to four channels: columns 0 to 3 are the values
// rounded to T, columns 4 to 7 the remainders of the rounding. v0, v1: channels image_channel(0, C) and
// image_channel(1, C), as float32 or as the bits of T.
template <class T>
DECO_DEVICE uint32_t channel_word(float v0, float v1) {
  const uint32_t values = pack<T>(v0, v1), rest = pack<T>(v0 - low<T>(values), v1 - high<T>(values));
  return lane() & 2 ? rest : values;
}
DECO_DEVICE uint32_t channel_word(uint32_t v0, uint32_t v1) { return lane() & 2 ? 0u : v0 | v1 << 16; }

// The two channels of a lane's rows in M tiles, as they are stored. They become words in a second step, before which
// nothing waits for the loads.
template <int M>
struct StoredChannels {
  uint32_t row[2 * M][2];  // float32, or 16 bits in the low half
};
template <class Stored, int M>
DECO_DEVICE StoredChannels<M> load_channels(const ChannelAddresses<M>& address) {
  StoredChannels<M> stored;
#pragma unroll
  for (int i = 0; i < 2 * M; ++i)
#pragma unroll
    for (int c = 0; c < 2; ++c) stored.row[i][c] = load(reinterpret_cast<const Stored*>(address.row[i][c]));
  return stored;
}
template <int M>
DECO_DEVICE StoredChannels<M> load_stored(const ChannelAddresses<M>& address, bool is_float32) {
  return is_float32 ? load_channels<uint32_t>(address) : load_channels<uint16_t>(address);
}
// `is_float32` as for the loads; otherwise the values are of dtype T.
template <class T, int M>
DECO_DEVICE void channel_words(uint32_t (&words)[M][2], const StoredChannels<M>& stored, bool is_float32) {
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    const auto& v = stored.row[i];
    words[i / 2][i % 2] =
        is_float32 ? channel_word<T>(float_of_bits(v[0]), float_of_bits(v[1])) : channel_word(v[0], v[1]);
  }
}

}  // namespace deco::cuda
