// Access to images [B, 3, H, W] in the flow-matching loss: a warp reads eight 8x8 blocks at a time.
//
// A group is eight consecutive 8x8 blocks of one image, in row-major order; the last group of an image may have fewer.
// With g = lane / 4 and t = lane % 4, a lane holds rows t and t + 4 of 8x8 block g. One load of a warp reads four runs
// of 64 pixels if the 8x8 blocks are adjacent.
#pragma once

#include "cuda/pixels.h"

namespace deco::cuda {

constexpr int kBlockSide = 8, kGroupBlocks = 8, kColors = 3;

// The 8x8 blocks of a batch of images with fewer than 2^31 pixels in total.
struct BlockGrid {
  Divider blocks_per_row, groups_per_image;
  uint32_t blocks_per_image = 0, groups = 0;

  BlockGrid() = default;
  // Height and width are multiples of 8.
  BlockGrid(int64_t batch, int64_t height, int64_t width)
      : blocks_per_row(static_cast<uint32_t>(width / kBlockSide)),
        blocks_per_image(static_cast<uint32_t>(height / kBlockSide * (width / kBlockSide))) {
    groups_per_image = Divider((blocks_per_image + kGroupBlocks - 1) / kGroupBlocks);
    groups = static_cast<uint32_t>(batch * groups_per_image.divisor);
  }
};

// First pixel of the lane's upper row, and whether its 8x8 block exists. If not, the pixel is in the last 8x8 block of
// the image.
struct LanePlace {
  PixelPlace pixel;
  bool exists;
};

DECO_DEVICE LanePlace locate(const BlockGrid& grid, uint32_t group) {
  const uint32_t image = grid.groups_per_image.quotient(group);
  const uint32_t wanted = (group - image * grid.groups_per_image.divisor) * kGroupBlocks + (lane() >> 2);
  const uint32_t in_image = min(wanted, grid.blocks_per_image - 1);
  const uint32_t row = grid.blocks_per_row.quotient(in_image), column = in_image - row * grid.blocks_per_row.divisor;
  return {{image, row * kBlockSide + (lane() & 3), column * kBlockSide}, wanted == in_image};
}

// A lane's pixels of a group: [channel][upper or lower row][column].
struct LanePixels {
  float v[kColors][2][kBlockSide];
};

// ---- eight adjacent values of an image row --------------------------------------------------------------------------

template <class T>
struct PixelRun {
  uint32_t word[4];

  DECO_DEVICE void load(const char* address) {
    const Words4 words = cuda::load(reinterpret_cast<const Words4*>(address));
    word[0] = words.x;
    word[1] = words.y;
    word[2] = words.z;
    word[3] = words.w;
  }
  DECO_DEVICE float value(int i) const { return i % 2 == 0 ? low<T>(word[i / 2]) : high<T>(word[i / 2]); }

  DECO_DEVICE static void store(char* address, const float (&v)[kBlockSide]) {
    store_global(reinterpret_cast<Words4*>(address),
                 Words4{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])});
  }
};

template <>
struct PixelRun<float> {
  float values[kBlockSide];

  DECO_DEVICE void load(const char* address) {
#pragma unroll
    for (int i = 0; i < kBlockSide; i += 4) {
      const Float4 four = cuda::load(reinterpret_cast<const Float4*>(address) + i / 4);
      values[i] = four.x;
      values[i + 1] = four.y;
      values[i + 2] = four.z;
      values[i + 3] = four.w;
    }
  }
  DECO_DEVICE float value(int i) const { return values[i]; }

  DECO_DEVICE static void store(char* address, const float (&v)[kBlockSide]) {
    cuda::store(reinterpret_cast<Float4*>(address), Float4{v[0], v[1], v[2], v[3]});
    cuda::store(reinterpret_cast<Float4*>(address) + 1, Float4{v[4], v[5], v[6], v[7]});
  }
};

// A lane's pixels of one image, in the image's dtype.
template <class T>
struct LaneRuns {
  PixelRun<T> run[kColors][2];

  DECO_DEVICE void load(const Image& image, const PixelPlace& place) {
    const char* pixel = image.at(place);
#pragma unroll
    for (int c = 0; c < kColors; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) run[c][r].load(pixel + (c * image.stride_c + r * (kBlockSide / 2) * image.stride_y));
  }
};

// Writes a lane's pixels times `sign`.
template <class T>
DECO_DEVICE void store_pixels(const Image& image, const PixelPlace& place, const LanePixels& pixels, float sign) {
  char* address = image.at(place);
#pragma unroll
  for (int c = 0; c < kColors; ++c)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float v[kBlockSide];
#pragma unroll
      for (int i = 0; i < kBlockSide; ++i) v[i] = sign * pixels.v[c][r][i];
      PixelRun<T>::store(address + (c * image.stride_c + r * (kBlockSide / 2) * image.stride_y), v);
    }
}

// ---- sources of the difference of pred and target -------------------------------------------------------------------

// Two images with unit stride along a row, rows aligned to 16 bytes, and height and width multiples of 8.
template <class Pred, class Target>
struct ImagePair {
  struct Runs {
    LaneRuns<Pred> pred;
    LaneRuns<Target> target;
  };
  // Contiguous images that receive the gradients; null: not computed.
  struct Gradients {
    Image pred, target;

    DECO_DEVICE void store(const PixelPlace& place, const LanePixels& grad) const {
      if (pred.data != nullptr) store_pixels<Pred>(pred, place, grad, 1.0f);
      if (target.data != nullptr) store_pixels<Target>(target, place, grad, -1.0f);
    }
    template <class V>
    void visit(V& buffers, int64_t batch, int64_t height, int64_t width) const {
      pred.visit(buffers, true, batch, kColors, height, width);
      target.visit(buffers, true, batch, kColors, height, width);
    }
  };

  Image pred, target;

  DECO_DEVICE void load(Runs& runs, const PixelPlace& place) const {
    runs.pred.load(pred, place);
    runs.target.load(target, place);
  }
  DECO_DEVICE static float difference(const Runs& runs, int c, int r, int i) {
    return runs.pred.run[c][r].value(i) - runs.target.run[c][r].value(i);
  }
  // Whether a pixel is in the image rather than in its padding.
  DECO_DEVICE static constexpr bool is_inside(uint32_t, uint32_t) { return true; }

  template <class V>
  void visit(V& buffers, int64_t batch, int64_t height, int64_t width) const {
    pred.visit(buffers, false, batch, kColors, height, width);
    target.visit(buffers, false, batch, kColors, height, width);
  }
};

// The difference of two images, float32, contiguous and padded by reflection to multiples of 8 (loss_padding.cu).
struct PaddedDifference {
  using Runs = LaneRuns<float>;
  // Gradient of the padded difference; may overwrite the difference.
  struct Gradients {
    Image difference;

    DECO_DEVICE void store(const PixelPlace& place, const LanePixels& grad) const {
      store_pixels<float>(difference, place, grad, 1.0f);
    }
    template <class V>
    void visit(V& buffers, int64_t batch, int64_t height, int64_t width) const {
      difference.visit(buffers, true, batch, kColors, height, width);
    }
  };

  Image image;
  uint32_t height = 0, width = 0;  // without the padding

  DECO_DEVICE void load(Runs& runs, const PixelPlace& place) const { runs.load(image, place); }
  DECO_DEVICE static float difference(const Runs& runs, int c, int r, int i) { return runs.run[c][r].value(i); }
  DECO_DEVICE bool is_inside(uint32_t y, uint32_t x) const { return y < height && x < width; }

  template <class V>
  void visit(V& buffers, int64_t batch, int64_t padded_height, int64_t padded_width) const {
    image.visit(buffers, false, batch, kColors, padded_height, padded_width);
  }
};

// Reads groups one after the other. `fetch` issues the loads; `differences` waits for them.
template <class Images>
class GroupReader {
 public:
  DECO_DEVICE GroupReader(const Images& images, const BlockGrid& grid) : images_(images), grid_(grid) {}

  // No effect if the group does not exist.
  DECO_DEVICE void fetch(uint32_t group) {
    if (group >= grid_.groups) return;
    place_ = locate(grid_, group);
    images_.load(runs_, place_.pixel);
  }
  DECO_DEVICE const LanePlace& place() const { return place_; }
  DECO_DEVICE LanePixels differences() const {
    LanePixels d;
#pragma unroll
    for (int c = 0; c < kColors; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < kBlockSide; ++i) d.v[c][r][i] = Images::difference(runs_, c, r, i);
    return d;
  }

 private:
  const Images& images_;
  const BlockGrid& grid_;
  LanePlace place_ = {};
  typename Images::Runs runs_ = {};
};

// ---- colors ---------------------------------------------------------------------------------------------------------

struct Color {
  float r, g, b;
};

// Row of the RGB -> YCbCr matrix (ITU-R BT.601) for Y, Cb or Cr.
DECO_DEVICE Color ycbcr_row(int channel) {
  if (channel == 0) return {0.299f, 0.587f, 0.114f};
  if (channel == 1) return {-0.168736f, -0.331264f, 0.5f};
  return {0.5f, -0.418688f, -0.081312f};
}
DECO_DEVICE float channel_value(const LanePixels& d, const Color& row, int r, int i) {
  return fmaf(row.r, d.v[0][r][i], fmaf(row.g, d.v[1][r][i], row.b * d.v[2][r][i]));
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// Sum over the lanes of a warp, in a fixed tree.
DECO_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace deco::cuda
