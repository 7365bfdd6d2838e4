// Flow-matching loss, part 1: tiles of an image, pred - target of a tile in RGB and YCbCr, the reflection R that pads
// the right and bottom edges to multiples of 8, and its transpose.
#pragma once

#include "cpu/dct.h"
#include "cpu/rows.h"
#include "deco/flow_matching_loss.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kTileWidth = 512;                  // the last tile of a strip may have up to 8 columns more
constexpr int kPitch = kTileWidth + 2 * kBlock;  // values per row of a plane

// M is kColorScale times these rows. One factor of 1 per row saves a multiplication.
constexpr float kColorScale[3] = {0.587f, 0.5f, 0.5f};
constexpr float kLumaR = 0.299 / 0.587, kLumaB = 0.114 / 0.587;  // Y  = kLumaR R + G + kLumaB B
constexpr float kCbR = -0.168736 / 0.5, kCbG = -0.331264 / 0.5;  // Cb = kCbR R + kCbG G + B
constexpr float kCrG = -0.418688 / 0.5, kCrB = -0.081312 / 0.5;  // Cr = R + kCrG G + kCrB B

// ycbcr = M rgb without kColorScale
DECO_INLINE void to_ycbcr(VecF red, VecF green, VecF blue, VecF (&ycbcr)[3]) {
  ycbcr[0] = fma(blue, broadcast(kLumaB), fma(red, broadcast(kLumaR), green));
  ycbcr[1] = fma(green, broadcast(kCbG), fma(red, broadcast(kCbR), blue));
  ycbcr[2] = fma(blue, broadcast(kCrB), fma(green, broadcast(kCrG), red));
}

// color = M' ycbcr without kColorScale
DECO_INLINE void transposed_color(VecF y, VecF cb, VecF cr, VecF (&color)[3]) {
  color[0] = fma(y, broadcast(kLumaR), fma(cb, broadcast(kCbR), cr));
  color[1] = fma(cb, broadcast(kCbG), fma(cr, broadcast(kCrG), y));
  color[2] = fma(y, broadcast(kLumaB), fma(cr, broadcast(kCrB), cb));
}

// Three channels of a tile.
struct Planes {
  alignas(64) float channel[3][kBlock][kPitch];
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---- tiles --------------------------------------------------------------------------------------------------------

struct Tile {
  int64_t sample, y, x;  // y, x: first row and column
  int rows, columns;     // inside the image
  int padded_columns;    // including reflected columns: a multiple of 8
  int vector_columns() const { return (padded_columns + kRowPixels - 1) / kRowPixels * kRowPixels; }
};

// Partition of the images into tiles. The last tile of a strip contains all columns that its reflected columns repeat.
class Tiling {
 public:
  explicit Tiling(const FlowMatchingLossInputs& inputs)
      : height_(inputs.height),
        width_(inputs.width),
        padded_width_(round_up(inputs.width, kBlock)),
        strips_(round_up(inputs.height, kBlock) / kBlock),
        tiles_per_strip_(padded_width_ <= kBlock ? 1 : round_up(padded_width_ - kBlock, kTileWidth) / kTileWidth),
        count_(inputs.batch * strips_ * tiles_per_strip_) {}

  int64_t count() const { return count_; }
  bool has_reflected_rows() const { return height_ % kBlock != 0; }
  int64_t last_strip_y() const { return (strips_ - 1) * kBlock; }

  Tile operator[](int64_t index) const {
    const int64_t column = index % tiles_per_strip_, strip = index / tiles_per_strip_;
    Tile tile;
    tile.sample = strip / strips_;
    tile.x = column * kTileWidth;
    set_strip(tile, strip % strips_ * kBlock);
    const bool is_last = column == tiles_per_strip_ - 1;
    tile.columns = static_cast<int>(is_last ? width_ - tile.x : kTileWidth);
    tile.padded_columns = static_cast<int>(is_last ? padded_width_ - tile.x : kTileWidth);
    return tile;
  }

  // Tile of the same columns in the last strip of the image.
  Tile in_last_strip(Tile tile) const {
    set_strip(tile, last_strip_y());
    return tile;
  }

  // Image row that row y of the padded image repeats.
  int64_t reflect_row(int64_t y) const { return y < height_ ? y : 2 * (height_ - 1) - y; }

 private:
  void set_strip(Tile& tile, int64_t y) const {
    tile.y = y;
    tile.rows = static_cast<int>(height_ - y < kBlock ? height_ - y : kBlock);
  }

  int64_t height_, width_, padded_width_, strips_, tiles_per_strip_, count_;
};

// ---- reading ------------------------------------------------------------------------------------------------------

// What becomes of rgb = pred - target besides its YCbCr: the sum of its squares, its values, or both.
enum class Difference { kSquares, kValues, kBoth };

// One row of the six image planes; each row holds a whole number of vectors.
struct RowSource {
  const void *pred[3], *target[3];
};

// Row r of the planes: rgb, and ycbcr = rgb in YCbCr without kColorScale. kSquares adds rgb^2 to `squares` instead of
// storing rgb, kBoth does both.
template <Difference kDifference, DType kPred, DType kTarget>
void read_row(const RowSource& source, int columns, int r, Planes& rgb, Planes& ycbcr, VecF& squares) {
  const auto difference = [&](int c, int x) DECO_INLINE_LAMBDA {
    return load_as<kPred>(source.pred[c], x) - load_as<kTarget>(source.target[c], x);
  };
  for (int x = 0; x < columns; x += kLanes) {
    const VecF red = difference(0, x), green = difference(1, x), blue = difference(2, x);
    if constexpr (kDifference != Difference::kValues) squares = squares + fma(blue, blue, fma(green, green, red * red));
    if constexpr (kDifference != Difference::kSquares) {
      store(&rgb.channel[0][r][x], red);
      store(&rgb.channel[1][r][x], green);
      store(&rgb.channel[2][r][x], blue);
    }
    VecF color[3];
    to_ycbcr(red, green, blue, color);
    unroll<3>([&](auto c) DECO_INLINE_LAMBDA { store(&ycbcr.channel[c][r][x], color[c]); });
  }
}

template <class Element>
void copy_row(const void* from, int64_t stride, int count, int padded_count, void* to) {
  const Element* source = static_cast<const Element*>(from);
  Element* row = static_cast<Element*>(to);
  for (int i = 0; i < count; ++i) row[i] = source[i * stride];
  for (int i = count; i < padded_count; ++i) row[i] = 0;
}

template <Difference kDifference>
class ImagePair {
 public:
  ImagePair(const FlowMatchingLossInputs& inputs, const Tiling& tiling)
      : pred_(inputs.pred), target_(inputs.target), tiling_(tiling) {
    with_dtype(pred_.dtype, [&](auto pred) {
      with_dtype(target_.dtype, [&](auto target) { read_row_ = read_row<kDifference, pred, target>; });
    });
  }

  // Fills all eight rows; rows below the image are read from the row that they repeat. Columns to the right of the
  // image are zero. Returns the sum of rgb^2 over the tile's pixels inside the image, 0 for kValues.
  float read(const Tile& tile, Planes& rgb, Planes& ycbcr) const {
    alignas(64) float packed[6][kPitch];
    VecF squares = broadcast(0.0f), below_image = squares;
    for (int r = 0; r < kBlock; ++r) {
      RowSource source;
      for (int c = 0; c < 3; ++c) {
        source.pred[c] = row_in_vectors(pred_, tile, c, r, packed[c]);
        source.target[c] = row_in_vectors(target_, tile, c, r, packed[3 + c]);
      }
      read_row_(source, tile.vector_columns(), r, rgb, ycbcr, r < tile.rows ? squares : below_image);
    }
    return sum(squares);
  }

  // Prefetches share `step` of `steps` of the tile's rows into the L2 cache, where pixels are contiguous.
  DECO_INLINE void prefetch(const Tile& tile, int step, int steps) const {
    constexpr int kRows = 2 * 3 * kBlock;
    for (int i = kRows * step / steps; i < kRows * (step + 1) / steps; ++i) {
      const ImageArray& image = i % 2 == 0 ? pred_ : target_;
      if (image.stride_x != 1) continue;
      const char* row = address(image, tile, i / 2 / kBlock, tiling_.reflect_row(tile.y + i / 2 % kBlock));
      for (int64_t byte = 0; byte < tile.columns * size_of(image.dtype); byte += kCacheLine)
        __builtin_prefetch(row + byte, 0, 2);
    }
  }

 private:
  static const char* address(const ImageArray& image, const Tile& tile, int c, int64_t y) {
    const int64_t offset =
        tile.sample * image.stride_b + c * image.stride_c + y * image.stride_y + tile.x * image.stride_x;
    return static_cast<const char*>(image.data) + offset * size_of(image.dtype);
  }

  // The row in place if its pixels are contiguous and fill whole vectors, otherwise a copy.
  const void* row_in_vectors(const ImageArray& image, const Tile& tile, int c, int r, void* packed) const {
    const void* row = address(image, tile, c, tiling_.reflect_row(tile.y + r));
    if (image.stride_x == 1 && tile.columns == tile.vector_columns()) return row;
    const auto copy = size_of(image.dtype) == 4 ? copy_row<uint32_t> : copy_row<uint16_t>;
    copy(row, image.stride_x, tile.columns, tile.vector_columns(), packed);
    return packed;
  }

  const ImageArray &pred_, &target_;
  const Tiling& tiling_;
  void (*read_row_)(const RowSource&, int, int, Planes&, Planes&, VecF&);
};

inline void clear(const Tile& tile, Planes& planes) {
  for (auto& channel : planes.channel)
    for (float* row : channel)
      for (int x = 0; x < tile.vector_columns(); ++x) row[x] = 0.0f;
}

// Columns to the right of the image repeat those to the left of its last column.
inline void reflect_columns(const Tile& tile, Planes& planes) {
  for (auto& channel : planes.channel)
    for (float* row : channel)
      for (int x = tile.columns; x < tile.padded_columns; ++x) row[x] = row[2 * (tile.columns - 1) - x];
}

// The transpose of `reflect_columns`.
inline void fold_columns(const Tile& tile, Planes& planes) {
  for (auto& channel : planes.channel)
    for (float* row : channel)
      for (int x = tile.columns; x < tile.padded_columns; ++x) row[2 * (tile.columns - 1) - x] += row[x];
}

// The transpose of the reflection of rows: adds each row of `last` (in the last strip) that is below the image to the
// row of `planes` that it repeats.
inline void fold_rows(const Tiling& tiling, const Tile& last_tile, const Planes& last, const Tile& tile,
                      Planes& planes) {
  for (int r = last_tile.rows; r < kBlock; ++r) {
    const int64_t repeated = tiling.reflect_row(last_tile.y + r) - tile.y;
    if (repeated < 0 || repeated >= tile.rows) continue;
    for (int c = 0; c < 3; ++c)
      for (int x = 0; x < tile.columns; ++x) planes.channel[c][repeated][x] += last.channel[c][r][x];
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
