// The flow-matching loss of DeCo (arXiv 2511.19365, section 3) and its gradient, each in one pass over both images.
//
//   d         = pred - target                                    [B, 3, H, W]
//   pixel     = 1/B sum_b w_b mean(d_b^2)
//   frequency = 1/B sum_b w_b mean(W (F R M d_b)^2)              mean over the padded size
//   gradient  = a_b d_b + f_b M' R' F' (W F R M d_b),  a_b = 2 w_b g_pixel / (3 B H W), f_b alike over the padded size
//
// M: RGB -> YCbCr, R: reflection of the right and bottom edge to multiples of 8, F: orthonormal 8x8 DCT-II,
// w: sample_weight, W: frequency_weight, ' : transpose. Normalisation of F is folded into W.
//
// A tile is one strip of 8 image rows, cut to kTileWidth columns. It is read into float planes in the caches (d and its
// YCbCr), transformed there in place, and written once. A thread owns a contiguous run of tiles. Tiles are wide so that
// memory is read in long runs, one after the other, which the processor prefetches by itself.
// Reflected rows repeat rows of the last two strips, so the gradient of these two needs the last strip's transform: the
// strip above computes it a second time instead of waiting for it.
//
// Per pixel: forward reads 6 values, backward reads 6 and writes 3 (6 with the target's gradient); 40 and 63 additions,
// multiplications and multiply-adds.
// Deterministic for a given thread count: each thread adds its tiles in order, in double, and the threads' sums are
// added in order. The gradients of the images do not depend on the thread count.
#include "deco/flow_matching_loss.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/dct.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int kTileWidth = 512;                  // of every tile but the last of a strip, which takes up to 8 more
constexpr int kPitch = kTileWidth + 2 * kBlock;  // values per row of a plane
constexpr int kFrequencies = kBlock * kBlock;
// Gradients beyond this size are written past the caches, which could not hold them until they are read.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;

// M is color_scale times these rows; a row without a factor 1 would cost one multiplication more.
constexpr float kColorScale[3] = {0.587f, 0.5f, 0.5f};
constexpr float kLumaR = 0.299 / 0.587, kLumaB = 0.114 / 0.587;     // Y  = kLumaR R + G + kLumaB B
constexpr float kCbR = -0.168736 / 0.5, kCbG = -0.331264 / 0.5;     // Cb = kCbR R + kCbG G + B
constexpr float kCrG = -0.418688 / 0.5, kCrB = -0.081312 / 0.5;     // Cr = R + kCrG G + kCrB B

// Three channels of a tile.
struct Planes {
  alignas(64) float channel[3][kBlock][kPitch];
};

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---- tiles --------------------------------------------------------------------------------------------------------

struct Tile {
  int64_t sample, y, x;   // its first row and column
  int rows, columns;      // those inside the image
  int padded_columns;     // with the reflected ones: a multiple of 8
  int vector_columns() const { return (padded_columns + kRowPixels - 1) / kRowPixels * kRowPixels; }
};

// Cuts images into tiles. The last tile of a strip holds every column that its reflected columns repeat.
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

  // The tile of the same columns in the last strip of the image.
  Tile in_last_strip(Tile tile) const {
    set_strip(tile, last_strip_y());
    return tile;
  }

  // The image row that row y repeats.
  int64_t reflect_row(int64_t y) const { return y < height_ ? y : 2 * (height_ - 1) - y; }

 private:
  void set_strip(Tile& tile, int64_t y) const {
    tile.y = y;
    tile.rows = static_cast<int>(height_ - y < kBlock ? height_ - y : kBlock);
  }

  int64_t height_, width_, padded_width_, strips_, tiles_per_strip_, count_;
};

// ---- reading ------------------------------------------------------------------------------------------------------

enum class Direction { kForward, kBackward };

// One row of the six planes that a tile reads; every plane holds a whole number of vectors.
struct RowSource {
  const void *pred[3], *target[3];
};

// Row r of the planes: rgb = pred - target and ycbcr = rgb in YCbCr (without color_scale). Forward adds rgb^2 to
// `squares` instead of keeping rgb.
template <Direction kDirection, DType kPred, DType kTarget>
void read_row(const RowSource& source, int columns, int r, Planes& rgb, Planes& ycbcr, VecF& squares) {
  const auto difference = [&](int c, int x) DECO_INLINE_LAMBDA {
    return load_as<kPred>(source.pred[c], x) - load_as<kTarget>(source.target[c], x);
  };
  for (int x = 0; x < columns; x += kLanes) {
    const VecF red = difference(0, x), green = difference(1, x), blue = difference(2, x);
    if constexpr (kDirection == Direction::kForward) {
      squares = squares + fma(blue, blue, fma(green, green, red * red));
    } else {
      store(&rgb.channel[0][r][x], red);
      store(&rgb.channel[1][r][x], green);
      store(&rgb.channel[2][r][x], blue);
    }
    store(&ycbcr.channel[0][r][x], fma(blue, broadcast(kLumaB), fma(red, broadcast(kLumaR), green)));
    store(&ycbcr.channel[1][r][x], fma(green, broadcast(kCbG), fma(red, broadcast(kCbR), blue)));
    store(&ycbcr.channel[2][r][x], fma(blue, broadcast(kCrB), fma(green, broadcast(kCrG), red)));
  }
}

template <class Element>
void copy_row(const void* from, int64_t stride, int count, int padded_count, void* to) {
  const Element* source = static_cast<const Element*>(from);
  Element* row = static_cast<Element*>(to);
  for (int i = 0; i < count; ++i) row[i] = source[i * stride];
  for (int i = count; i < padded_count; ++i) row[i] = 0;
}

template <Direction kDirection>
class ImagePair {
 public:
  ImagePair(const FlowMatchingLossInputs& inputs, const Tiling& tiling)
      : pred_(inputs.pred), target_(inputs.target), tiling_(tiling) {
    with_dtype(pred_.dtype, [&](auto pred) {
      with_dtype(target_.dtype, [&](auto target) { read_row_ = read_row<kDirection, pred, target>; });
    });
  }

  // Fills all eight rows; those below the image come from the row they repeat. Columns right of the image are zero.
  // Forward returns the sum of rgb^2 over the image.
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

 private:
  static const char* address(const ImageArray& image, const Tile& tile, int c, int64_t y) {
    const int64_t offset =
        tile.sample * image.stride_b + c * image.stride_c + y * image.stride_y + tile.x * image.stride_x;
    return static_cast<const char*>(image.data) + offset * size_of(image.dtype);
  }

  // The row itself where its pixels are neighbours and fill whole vectors, else a copy.
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

void clear(const Tile& tile, Planes& planes) {
  for (auto& channel : planes.channel)
    for (float* row : channel)
      for (int x = 0; x < tile.vector_columns(); ++x) row[x] = 0.0f;
}

// Columns right of the image repeat those left of its last one.
void reflect_columns(const Tile& tile, Planes& planes) {
  for (auto& channel : planes.channel)
    for (float* row : channel)
      for (int x = tile.columns; x < tile.padded_columns; ++x) row[x] = row[2 * (tile.columns - 1) - x];
}

// The transpose of `reflect_columns`.
void fold_columns(const Tile& tile, Planes& planes) {
  for (auto& channel : planes.channel)
    for (float* row : channel)
      for (int x = tile.columns; x < tile.padded_columns; ++x) row[2 * (tile.columns - 1) - x] += row[x];
}

// The transpose of the reflection of rows: adds the rows of `last`, in the last strip, that lie below the image to
// those rows of `planes` which they repeat.
void fold_rows(const Tiling& tiling, const Tile& last_tile, const Planes& last, const Tile& tile, Planes& planes) {
  for (int r = last_tile.rows; r < kBlock; ++r) {
    const int64_t repeated = tiling.reflect_row(last_tile.y + r) - tile.y;
    if (repeated < 0 || repeated >= tile.rows) continue;
    for (int c = 0; c < 3; ++c)
      for (int x = 0; x < tile.columns; ++x) planes.channel[c][repeated][x] += last.channel[c][r][x];
  }
}

// ---- the transform ------------------------------------------------------------------------------------------------

// The factor that turns the square of a coefficient, as transform_blocks has it, into that of F M.
float square_norm(int channel, int vertical, int horizontal) {
  return dct_square_norm(vertical) * dct_square_norm(horizontal) * kColorScale[channel] * kColorScale[channel];
}

// One number per coefficient, as transformed blocks lie in registers: row = horizontal frequency, lane = vertical
// frequency, once for each block of a BlockRow.
struct CoefficientTable {
  alignas(64) float value[3][kBlock][kRowPixels];
};

// Calls body(value, channel, vertical, horizontal frequency) for all of the table.
template <class Table, class Body>
DECO_INLINE void for_each_coefficient(Table& table, Body&& body) {
  for (int c = 0; c < 3; ++c)
    for (int h = 0; h < kBlock; ++h)
      for (int lane = 0; lane < kRowPixels; ++lane) body(table.value[c][h][lane], c, lane % kBlock, h);
}

DECO_INLINE int frequency_index(int channel, int vertical, int horizontal) {
  return (channel * kBlock + vertical) * kBlock + horizontal;
}

// factor * W, with all normalisation
void fill_weights(const float* frequency_weight, float factor, CoefficientTable& weights) {
  for_each_coefficient(weights, [&](float& value, int c, int v, int h) {
    value = factor * (frequency_weight[frequency_index(c, v, h)] * square_norm(c, v, h));
  });
}

// F: the coefficients of the blocks at column x; row = horizontal frequency, lane = vertical frequency.
DECO_INLINE void load_coefficients(const float (*plane)[kPitch], int x, BlockRow (&block)[kBlock]) {
  unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA { block[i] = load_row(plane[i] + x); });
  dct(block);
  transpose_blocks(block);
  dct(block);
}

// F'
DECO_INLINE void store_transposed(BlockRow (&block)[kBlock], float (*plane)[kPitch], int x) {
  dct_transposed(block);
  transpose_blocks(block);
  dct_transposed(block);
  unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA { store_row(plane[i] + x, block[i]); });
}

// Calls body(channel, x) for every BlockRow of the tile.
template <class Body>
DECO_INLINE void for_each_block(const Tile& tile, Body&& body) {
  for (int c = 0; c < 3; ++c)
    for (int x = 0; x < tile.vector_columns(); x += kRowPixels) body(c, x);
}

// sum of weights * (F ycbcr)^2
float weighted_energy(const CoefficientTable& weights, const Tile& tile, const Planes& ycbcr) {
  BlockRow energy = broadcast_row(0.0f);
  const auto add_block = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA {
      energy = fma(block[i] * load_row(weights.value[c][i]), block[i], energy);
    });
  };
  for_each_block(tile, add_block);
  return sum(energy);
}

// ycbcr <- F' weights F ycbcr
void apply_weights(const CoefficientTable& weights, const Tile& tile, Planes& ycbcr) {
  const auto apply = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA { block[i] = block[i] * load_row(weights.value[c][i]); });
    store_transposed(block, ycbcr.channel[c], x);
  };
  for_each_block(tile, apply);
}

// sums [3, 8, 8] <- (F M d)^2, summed over the blocks of the tile
void sum_squares(const Tile& tile, const Planes& ycbcr, double* sums) {
  CoefficientTable squares = {};
  const auto add_block = [&](int c, int x) DECO_INLINE_LAMBDA {
    BlockRow block[kBlock];
    load_coefficients(ycbcr.channel[c], x, block);
    unroll<kBlock>([&](auto i) DECO_INLINE_LAMBDA {
      store_row(squares.value[c][i], fma(block[i], block[i], load_row(squares.value[c][i])));
    });
  };
  for_each_block(tile, add_block);
  for (int k = 0; k < 3 * kFrequencies; ++k) sums[k] = 0.0;
  for_each_coefficient(squares, [&](float square, int c, int v, int h) {
    sums[frequency_index(c, v, h)] += double{square} * square_norm(c, v, h);
  });
}

// ---- writing ------------------------------------------------------------------------------------------------------

// Row r of the gradient, sign * (a rgb + M' ycbcr), to three channels of whole vectors. kStreaming: past the caches, to
// aligned float32.
template <DType kDType, bool kNegative, bool kStreaming>
void write_row(const Planes& rgb, const Planes& ycbcr, int r, int columns, float pixel_factor, void* const (&to)[3]) {
  const VecF a = broadcast(pixel_factor);
  for (int x = 0; x < columns; x += kLanes) {
    const VecF y = load(&ycbcr.channel[0][r][x]), cb = load(&ycbcr.channel[1][r][x]), cr = load(&ycbcr.channel[2][r][x]);
    const VecF color[3] = {fma(y, broadcast(kLumaR), fma(cb, broadcast(kCbR), cr)),
                           fma(cb, broadcast(kCbG), fma(cr, broadcast(kCrG), y)),
                           fma(y, broadcast(kLumaB), fma(cr, broadcast(kCrB), cb))};
    unroll<3>([&](auto c) DECO_INLINE_LAMBDA {
      VecF value = fma(a, load(&rgb.channel[c][r][x]), color[c]);
      if constexpr (kNegative) value = broadcast(0.0f) - value;
      if constexpr (kStreaming) {
        store_streaming(static_cast<float*>(to[c]) + x, value);
      } else {
        store_as<kDType>(to[c], x, value);
      }
    });
  }
}

// Copies bytes past the caches, where the destination is aligned to a vector.
void copy_streaming(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kVectorBytes = kLanes * sizeof(float);
  int64_t head = -reinterpret_cast<intptr_t>(to) & (kVectorBytes - 1);
  if (head > bytes) head = bytes;
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes)
    store_streaming(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  std::memcpy(to + i, from + i, bytes - i);
}

// Streaming stores may pass later ones; after this, another thread that sees this one finish sees them too.
void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One of the two gradients of the images, which differ in sign and dtype.
template <bool kNegative>
class GradientWriter {
 public:
  GradientWriter(const Array& gradient, const FlowMatchingLossInputs& inputs)
      : gradient_(gradient), height_(inputs.height), width_(inputs.width) {
    streaming_ = inputs.batch * 3 * height_ * width_ * size_of(gradient.dtype) > kStreamingBytes;
    with_dtype(gradient.dtype, [&](auto dtype) { write_row_ = write_row<dtype, kNegative, false>; });
  }

  bool wanted() const { return gradient_.data != nullptr; }

  void write(const Planes& rgb, const Planes& ycbcr, const Tile& tile, float pixel_factor) const {
    constexpr int kVectorBytes = kLanes * sizeof(float);
    alignas(64) float staged[3][kPitch];
    const int columns = tile.vector_columns();
    for (int r = 0; r < tile.rows; ++r) {
      void* row[3];
      bool aligned = true;
      for (int c = 0; c < 3; ++c) {
        const int64_t offset = ((tile.sample * 3 + c) * height_ + tile.y + r) * width_ + tile.x;
        row[c] = static_cast<char*>(gradient_.data) + offset * size_of(gradient_.dtype);
        aligned = aligned && reinterpret_cast<intptr_t>(row[c]) % kVectorBytes == 0;
      }
      const bool whole_vectors = tile.columns == columns;
      if (whole_vectors && !streaming_) {
        write_row_(rgb, ycbcr, r, columns, pixel_factor, row);
      } else if (whole_vectors && aligned && gradient_.dtype == DType::kFloat32) {
        write_row<DType::kFloat32, kNegative, true>(rgb, ycbcr, r, columns, pixel_factor, row);
      } else {
        void* const staged_row[3] = {staged[0], staged[1], staged[2]};
        write_row_(rgb, ycbcr, r, columns, pixel_factor, staged_row);
        for (int c = 0; c < 3; ++c) copy(row[c], staged[c], tile.columns * size_of(gradient_.dtype));
      }
    }
  }

 private:
  void copy(void* to, const void* from, int64_t bytes) const {
    if (streaming_) {
      copy_streaming(static_cast<char*>(to), static_cast<const char*>(from), bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }

  Array gradient_;
  int64_t height_, width_;
  bool streaming_;
  void (*write_row_)(const Planes&, const Planes&, int, int, float, void* const (&)[3]);
};

// ---- forward ------------------------------------------------------------------------------------------------------

// Sums over all pixels of one sample: of d^2, and of W (F R M d)^2.
struct SampleSums {
  double pixel, frequency;
};

// The sums of one sample over all threads; `sums` is [threads][B].
SampleSums total_of(const SampleSums* sums, int64_t batch, int parts, int64_t sample) {
  SampleSums total = {0.0, 0.0};
  for (int part = 0; part < parts; ++part) {
    total.pixel += sums[part * batch + sample].pixel;
    total.frequency += sums[part * batch + sample].frequency;
  }
  return total;
}

// 1 / (B * elements per sample), without and with padding; zeros for an empty batch
struct Normalization {
  double pixel = 0.0, frequency = 0.0;

  explicit Normalization(const FlowMatchingLossInputs& inputs) {
    if (inputs.batch == 0) return;
    const double planes = 3.0 * inputs.batch;
    pixel = 1.0 / (planes * inputs.height * inputs.width);
    frequency = 1.0 / (planes * round_up(inputs.height, kBlock) * round_up(inputs.width, kBlock));
  }
};

double weight_of(const FlowMatchingLossInputs& inputs, int64_t sample) {
  return inputs.sample_weight == nullptr ? 1.0 : inputs.sample_weight[sample];
}

void write_loss(float* loss, double value) {
  if (loss != nullptr) *loss = static_cast<float>(value);
}

}  // namespace

void flow_matching_loss_forward(const FlowMatchingLossForward& call) {
  const FlowMatchingLossInputs& inputs = call.inputs;
  const Tiling tiling(inputs);
  const ImagePair<Direction::kForward> images(inputs, tiling);
  const int parts = part_count(tiling.count(), inputs.threads);
  SampleSums* const sums = reinterpret_cast<SampleSums*>(inputs.workspace);

  parallel_for(parts, [&](int part) {
    CoefficientTable weights;
    fill_weights(inputs.frequency_weight, 1.0f, weights);
    Planes rgb, ycbcr;
    const Range range = share_of(tiling.count(), parts, part);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Tile tile = tiling[i];
      SampleSums& tile_sums = sums[part * inputs.batch + tile.sample];
      tile_sums.pixel += images.read(tile, rgb, ycbcr);
      reflect_columns(tile, ycbcr);
      tile_sums.frequency += weighted_energy(weights, tile, ycbcr);
    }
  });

  const Normalization normalization(inputs);
  double pixel = 0.0, frequency = 0.0;
  for (int64_t b = 0; b < inputs.batch; ++b) {
    const SampleSums total = total_of(sums, inputs.batch, parts, b);
    pixel += weight_of(inputs, b) * normalization.pixel * total.pixel;
    frequency += weight_of(inputs, b) * normalization.frequency * total.frequency;
  }
  write_loss(call.total, pixel + call.frequency_scale * frequency);
  write_loss(call.pixel, pixel);
  write_loss(call.frequency, frequency);
}

// ---- backward -----------------------------------------------------------------------------------------------------

namespace {

// What the threads share.
struct BackwardPlan {
  const FlowMatchingLossBackward& call;
  const FlowMatchingLossInputs& inputs;
  Tiling tiling;
  ImagePair<Direction::kBackward> images;
  GradientWriter<false> pred_writer;
  GradientWriter<true> target_writer;
  double pixel_factor, frequency_factor;  // of the two losses, times their normalisation
  int parts;
  SampleSums* sample_sums;  // [parts][B]
  double* frequency_sums;   // [parts][3, 8, 8]

  explicit BackwardPlan(const FlowMatchingLossBackward& c)
      : call(c),
        inputs(c.inputs),
        tiling(inputs),
        images(inputs, tiling),
        pred_writer(c.grad_pred, inputs),
        target_writer(c.grad_target, inputs),
        pixel_factor(c.grad_pixel * Normalization(inputs).pixel),
        frequency_factor(c.grad_frequency * Normalization(inputs).frequency),
        parts(part_count(tiling.count(), inputs.threads)),
        sample_sums(reinterpret_cast<SampleSums*>(inputs.workspace)),
        frequency_sums(inputs.workspace + 2 * inputs.batch * parts) {}

  bool wants_images() const { return pred_writer.wanted() || target_writer.wanted(); }
  bool wants_weights() const { return call.grad_frequency_weight != nullptr || call.grad_sample_weight != nullptr; }
};

// One thread's tiles.
class BackwardWorker {
 public:
  BackwardWorker(const BackwardPlan& plan, int part) : plan_(plan), part_(part) {}

  void process(const Tile& tile) {
    const double weight = weight_of(plan_.inputs, tile.sample);
    plan_.images.read(tile, rgb_, ycbcr_);
    reflect_columns(tile, ycbcr_);
    if (plan_.call.grad_pixel == 0.0) clear(tile, rgb_);  // else 0 times an infinite difference would be NaN
    if (plan_.wants_weights()) add_sums(tile, weight);
    if (!plan_.wants_images()) return;

    if (tile.sample != weighted_sample_) {
      fill_weights(plan_.inputs.frequency_weight, static_cast<float>(2.0 * weight * plan_.frequency_factor), weights_);
      weighted_sample_ = tile.sample;
    }
    apply_weights(weights_, tile, ycbcr_);
    fold_columns(tile, ycbcr_);
    add_reflected_rows(tile);
    const float pixel_factor = static_cast<float>(2.0 * weight * plan_.pixel_factor);
    if (plan_.pred_writer.wanted()) plan_.pred_writer.write(rgb_, ycbcr_, tile, pixel_factor);
    if (plan_.target_writer.wanted()) plan_.target_writer.write(rgb_, ycbcr_, tile, pixel_factor);
  }

 private:
  // For the gradients of the weights: sums of d^2 and W (F R M d)^2 per sample, and of (F R M d)^2 per frequency.
  void add_sums(const Tile& tile, double weight) {
    SampleSums& sums = plan_.sample_sums[part_ * plan_.inputs.batch + tile.sample];
    for (const auto& channel : rgb_.channel)
      for (int r = 0; r < tile.rows; ++r)
        for (int x = 0; x < tile.columns; ++x) sums.pixel += double{channel[r][x]} * channel[r][x];
    double squares[3 * kFrequencies];
    sum_squares(tile, ycbcr_, squares);
    double* const frequency_sums = plan_.frequency_sums + part_ * 3 * kFrequencies;
    for (int k = 0; k < 3 * kFrequencies; ++k) {
      sums.frequency += plan_.inputs.frequency_weight[k] * squares[k];
      frequency_sums[k] += weight * squares[k];
    }
  }

  // The part of R' that crosses rows.
  void add_reflected_rows(const Tile& tile) {
    const Tiling& tiling = plan_.tiling;
    if (!tiling.has_reflected_rows() || tile.y + kBlock < tiling.last_strip_y()) return;
    const Tile last = tiling.in_last_strip(tile);
    if (last.y == tile.y) return fold_rows(tiling, last, ycbcr_, tile, ycbcr_);
    Planes rgb, ycbcr;
    plan_.images.read(last, rgb, ycbcr);
    reflect_columns(last, ycbcr);
    apply_weights(weights_, last, ycbcr);
    fold_columns(last, ycbcr);
    fold_rows(tiling, last, ycbcr, tile, ycbcr_);
  }

  const BackwardPlan& plan_;
  int part_;
  int64_t weighted_sample_ = -1;  // weights_ holds its factor
  CoefficientTable weights_;
  Planes rgb_, ycbcr_;  // d, and R M d, which becomes f R' F' W F R M d
};

}  // namespace

void flow_matching_loss_backward(const FlowMatchingLossBackward& call) {
  const BackwardPlan plan(call);
  parallel_for(plan.parts, [&](int part) {
    BackwardWorker worker(plan, part);
    const Range range = share_of(plan.tiling.count(), plan.parts, part);
    for (int64_t i = range.begin; i < range.end; ++i) worker.process(plan.tiling[i]);
    finish_streaming();
  });

  if (call.grad_sample_weight != nullptr) {
    for (int64_t b = 0; b < call.inputs.batch; ++b) {
      const SampleSums total = total_of(plan.sample_sums, call.inputs.batch, plan.parts, b);
      call.grad_sample_weight[b] =
          static_cast<float>(plan.pixel_factor * total.pixel + plan.frequency_factor * total.frequency);
    }
  }
  if (call.grad_frequency_weight != nullptr) {
    for (int k = 0; k < 3 * kFrequencies; ++k) {
      double sum = 0.0;
      for (int part = 0; part < plan.parts; ++part) sum += plan.frequency_sums[part * 3 * kFrequencies + k];
      call.grad_frequency_weight[k] = static_cast<float>(plan.frequency_factor * sum);
    }
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
