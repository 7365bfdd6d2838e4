// The pixels of a warp that owns M tiles of 16 pixels in each turn of a persistent grid, and where their values are.
// With `first` the first pixel of the warp, row i < 2·M of a lane is pixel first + lane / 4 + 8·i.
//
//   GeneralPixels   any patch size and any tensor: the place of every row, with 64-bit offsets
//   CompactPixels   the pixels of a warp lie in one token and all offsets fit in 32 bits: the place of the warp's first
//                   pixel, from which the offsets of the rows do not change from turn to turn
//
// Rows without a pixel repeat another one. `first` may lie behind the last pixel.
#pragma once

#include <initializer_list>

#include "cuda/decoder_geometry.h"

namespace deco::cuda {

// The thread blocks of the decoder's kernels that own pixels.
template <int D>
constexpr bool kAhead = D <= 32;  // whether registers allow to load a tile's inputs a turn ahead
constexpr int kWarps = 8, kThreads = 32 * kWarps;
template <int D>
constexpr int kTiles = D <= 32 ? 2 : 1;  // per warp: two tiles share the loads of weights if they fit in registers
template <int D>
constexpr int kWarpPixels = kTilePixels * kTiles<D>;  // in one turn of the grid
template <int D>
constexpr int kBlockPixels = kWarps * kWarpPixels<D>;

// Pixels `first` to first + count - 1 of a batch: whole tokens.
struct PixelRange {
  PatchGrid grid;
  uint32_t first = 0, count = 0;
};

// Of a lane's first channel in each row of cond.
template <int M>
struct RowAddresses {
  const void* row[2 * M];
};

constexpr int kLaneBytes = 32 * 20;  // shared memory for the lanes' offsets in one tensor

template <int M>
class GeneralPixels {
 public:
  // The lane's channel of an image and the next one, or its first channel of rows of cond.
  struct Lane {
    int channel, next;
  };
  static DECO_DEVICE Lane lane_of(const PixelRange&, const Image&, int channel, int next, char*) {
    return {channel, next};
  }
  static DECO_DEVICE Lane lane_of(const PixelRange&, const PatchRows&, int channel, char*) { return {channel, 0}; }

  // The pixels from `first` of the range on, a multiple of 16·M.
  DECO_DEVICE GeneralPixels(const PixelRange& range, uint32_t first) : range_(&range), first_(first) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) place_[i] = locate(range.grid, range.first + pixel(i));
  }
  DECO_DEVICE bool exists(int i) const { return row(i) < range_->count; }
  // Whether sums over the tiles are to be formed, with the words of missing rows zeroed by `clear_missing`.
  DECO_DEVICE bool any_exists() const { return true; }
  DECO_DEVICE void clear_missing(uint32_t (&words)[M][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) words[i / 2][i % 2] = exists(i) ? words[i / 2][i % 2] : 0u;
  }
  template <int D>
  DECO_DEVICE void clear_missing(Operand<D>& tile) const {
    static_assert(M == 1);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (!exists(r)) tile.clear_row(r);
  }

  DECO_DEVICE ChannelAddresses<M> addresses(const Image& image, const Lane& of) const {
    ChannelAddresses<M> addresses;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      addresses.row[i][0] = image.at(place_[i], of.channel);
      addresses.row[i][1] = image.at(place_[i], of.next);
    }
    return addresses;
  }
  DECO_DEVICE RowAddresses<M> addresses(const PatchRows& rows, const Lane& of) const {
    RowAddresses<M> addresses;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) addresses.row[i] = rows.at<uint16_t>(pixel(i), of.channel);
    return addresses;
  }
  // Number of tile m among the tiles of 16 pixels of a patch.
  DECO_DEVICE int64_t patch_tile(int m) const {
    return ((first_ + kTilePixels * m) & range_->grid.pixel_mask()) / kTilePixels;
  }

 private:
  DECO_DEVICE uint32_t row(int i) const { return first_ + (lane() >> 2) + 8 * i; }
  DECO_DEVICE uint32_t pixel(int i) const {
    uint32_t pixel = row(i);
    // region: last_pixel_for_missing_ones
    pixel = min(pixel, range_->count - 1);
    // end region
    return pixel;
  }

  const PixelRange* range_;
  uint32_t first_;
  PixelPlace place_[2 * M];
};

template <int M>
class CompactPixels {
 public:
  static_assert(M <= 2, "the offsets of a lane's rows are four words");

  // Offsets in bytes, in shared memory: of the lane's rows from the warp's first pixel, and from the lane's channel to
  // the next one. In registers they would leave too few for the activations, and the compiler would rather compute them
  // in every turn.
  struct Lane {
    const Words4* rows;
    const uint32_t* next;
  };
  // Called by all threads, with a barrier before the loop; `memory`: kLaneBytes of shared memory.
  static DECO_DEVICE Lane lane_of(const PixelRange& range, const Image& image, int channel, int next, char* memory) {
    const int log2_patch = range.grid.log2_patch;
    const auto c = static_cast<uint32_t>(image.stride_c);
    const auto row = [&](uint32_t k) {
      return offset(image, {0, k >> log2_patch, k & ((1u << log2_patch) - 1)}) + channel * c;
    };
    return store_offsets(memory, row, (next - channel) * c);
  }
  static DECO_DEVICE Lane lane_of(const PixelRange&, const PatchRows& rows, int channel, char* memory) {
    return store_offsets(memory, [&](uint32_t k) { return offset(rows, 0, k) + 2 * channel; }, 0);
  }

  DECO_DEVICE CompactPixels(const PixelRange& range, uint32_t first) : range_(&range) {
    exists_ = first < range.count;
    first_ = min(first, range.count - kTilePixels * M);
    place_ = locate(range.grid, range.first + first_);
  }
  DECO_DEVICE bool exists(int) const { return exists_; }
  DECO_DEVICE bool any_exists() const { return exists_; }
  DECO_DEVICE void clear_missing(uint32_t (&)[M][2]) const {}
  template <int D>
  DECO_DEVICE void clear_missing(Operand<D>&) const {}

  DECO_DEVICE ChannelAddresses<M> addresses(const Image& image, const Lane& of) const {
    char* first = image.data + offset(image, place_);
    const Words4 rows = load(of.rows);
    const uint32_t row[4] = {rows.x, rows.y, rows.z, rows.w}, next = load(of.next);
    ChannelAddresses<M> addresses;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      addresses.row[i][0] = first + row[i];
      addresses.row[i][1] = first + row[i] + next;
    }
    return addresses;
  }
  DECO_DEVICE RowAddresses<M> addresses(const PatchRows& rows, const Lane& of) const {
    const uint32_t token = first_ >> rows.log2_pixels, k = first_ & range_->grid.pixel_mask();
    const char* first = static_cast<const char*>(rows.data) + offset(rows, token, k);
    const Words4 words = load(of.rows);
    const uint32_t row[4] = {words.x, words.y, words.z, words.w};
    RowAddresses<M> addresses;
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) addresses.row[i] = first + row[i];
    return addresses;
  }
  DECO_DEVICE int64_t patch_tile(int m) const {
    return int64_t{(first_ & range_->grid.pixel_mask()) / kTilePixels} + m;
  }

 private:
  template <class Row>
  static DECO_DEVICE Lane store_offsets(char* memory, Row&& row, uint32_t next) {
    auto* rows = reinterpret_cast<Words4*>(memory) + lane();
    auto* own_next = reinterpret_cast<uint32_t*>(memory + 32 * sizeof(Words4)) + lane();
    const uint32_t k = lane() >> 2;
    if (warp() == 0) {
      store(rows, Words4{row(k), row(k + 8), row(k + 16), row(k + 24)});
      store(own_next, next);
    }
    return {rows, own_next};
  }
  static DECO_DEVICE uint32_t offset(const Image& image, const PixelPlace& place) {
    const auto b = static_cast<uint32_t>(image.stride_b), y = static_cast<uint32_t>(image.stride_y),
               x = static_cast<uint32_t>(image.stride_x);
    return place.image * b + place.y * y + place.x * x;
  }
  static DECO_DEVICE uint32_t offset(const PatchRows& rows, uint32_t token, uint32_t k) {
    return 2 * (token * static_cast<uint32_t>(rows.token_stride) + k * static_cast<uint32_t>(rows.pixel_stride));
  }

  const PixelRange* range_;
  uint32_t first_;
  bool exists_;
  PixelPlace place_;  // of the warp's first pixel
};

// Loads the lane's channels of its rows of cond.
template <int D, int M, class Pixels>
DECO_DEVICE void load_rows(RowWords<D> (&words)[2 * M], const Pixels& pixels, const PatchRows& rows,
                           const typename Pixels::Lane& of) {
  const RowAddresses<M> addresses = pixels.addresses(rows, of);
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) words[i] = load_row<D>(addresses.row[i]);
}

// The same for a query that may be null: zeros.
template <int D, int M, class Pixels>
DECO_DEVICE void load_query(RowWords<D> (&words)[2 * M], const Pixels& pixels, const PatchRows& query,
                            const typename Pixels::Lane& of) {
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) words[i] = {};
  if (query.data != nullptr) load_rows<D, M>(words, pixels, query, of);
}

template <int M, bool General>
using WarpPixels = std::conditional_t<General, GeneralPixels<M>, CompactPixels<M>>;

// Calls run(std::bool_constant<General>{}) for tensors of these sizes in bytes. DECO_ONLY_PLAIN leaves the kernels with
// GeneralPixels out.
template <int M, class Run>
Status with_pixels(const DecoderShape& shape, std::initializer_list<int64_t> bytes, Run&& run) {
#ifndef DECO_ONLY_PLAIN
  if (shape.pixels_per_token() % (kTilePixels * M) != 0 || std::max(bytes) > int64_t{1} << 32)
    return run(std::true_type{});
#endif
  return run(std::false_type{});
}

}  // namespace deco::cuda
