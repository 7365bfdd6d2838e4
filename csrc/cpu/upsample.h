// Upsample matmul of the fused ops: y = W_up[k] token + b_up[k] for pixel k of a token, with W_up[k] [D][Z].
//
// A tile holds pixel k of kTokenTile consecutive tokens, channel-major, [D][kTokenTile], one token per vector lane.
// Tokens are processed in chunks of kTokenChunk. All threads together transpose a chunk once, [strips][elements]
// [kStrip], and then share it. Each part (thread) processes contiguous shares of the chunk's tiles, pixel by pixel, and
// packs the weights of one pixel at a time into its own panel (panel.h). Both factors of the matmul are then read
// linearly, the panel (147 KB at D = 32, Z = 1152 in float) from the L2 cache.
//
// Per tile: D * kTokenTile * Z multiply-adds. Memory traffic: the weights once per chunk, the tokens once; y is stored
// only if the caller wants it. An element is that of an Operand (matmul.h): one value, or a pair along Z; rows are
// padded with zeros to a whole number of vectors. Deterministic: every y is one sum over Z in a fixed order,
// independent of the tile and of the number of threads.
#pragma once

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/decoder_tile.h"
#include "cpu/panel.h"
#include "deco/upsample.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kTokenTile = 64;
constexpr int64_t kTokenChunk = 1024;

// kLanes elements starting at value `first`, rounded to `rounding`.
template <class Operand, DType kStorage>
DECO_INLINE typename Operand::Vector load_elements(const void* row, int64_t first, DType rounding) {
  if constexpr (Operand::kPack == 1) {
    return round_vector(rounding, load_as<kStorage>(row, first));
  } else {
    return join_runs(load_as<kStorage>(row, first), load_as<kStorage>(row, first + kLanes));
  }
}

// square[i] = kLanes elements from value `first` on of row i, of `width` values; 0 beyond the end of the row.
template <class Operand, DType kStorage>
DECO_INLINE void load_square(const char* const (&rows)[kLanes], int64_t first, int64_t width, DType rounding,
                             typename Operand::Vector (&square)[kLanes]) {
  constexpr int kValues = kLanes * Operand::kPack;
  constexpr int64_t kBytes = size_of(kStorage);
  if (first + kValues <= width) {
    unroll<kLanes>([&](auto i)
                       DECO_INLINE_LAMBDA { square[i] = load_elements<Operand, kStorage>(rows[i], first, rounding); });
  } else {
    alignas(64) char ends[kLanes][kValues * kBytes] = {};
    for (int i = 0; i < kLanes; ++i) std::memcpy(ends[i], rows[i] + first * kBytes, (width - first) * kBytes);
    unroll<kLanes>([&](auto i)
                       DECO_INLINE_LAMBDA { square[i] = load_elements<Operand, kStorage>(ends[i], 0, rounding); });
  }
}

// One tile of a chunk: pixel `pixel` of tokens first_token .. first_token + count - 1.
template <class Operand>
struct UpsampleTile {
  using Element = typename Operand::Element;
  int pixel, count;
  int64_t first_token;
  Element* weights;       // the panel of the pixel (panel.h)
  const float* bias;      // [D]
  const Element* tokens;  // [strips][elements][kStrip]
  // Weights of the next panel, to prefetch during this tile; empty if there is no next panel.
  const char *ahead, *ahead_end;

  int pixels() const { return whole_strips(count); }
};

// addresses[i] = address of the tile's row i; rows beyond the end of the tile repeat the last row.
template <class Operand, class Pointer>
void tile_addresses(const PixelRows& rows, const UpsampleTile<Operand>& tile, Pointer (&addresses)[kTokenTile]) {
  for (int i = 0; i < kTokenTile; ++i) {
    const int64_t token = tile.first_token + (i < tile.count ? i : tile.count - 1);
    const int64_t offset = token * rows.token_stride + tile.pixel * rows.pixel_stride;
    addresses[i] = static_cast<char*>(rows.data) + offset * size_of(rows.dtype);
  }
}

template <class Operand, int D>
class Upsample {
 public:
  using Element = typename Operand::Element;
  using Vector = typename Operand::Vector;

  Upsample(const UpsampleArrays& arrays, int threads)
      : arrays_(arrays),
        elements_(round_up((arrays.token_width + Operand::kPack - 1) / Operand::kPack, kLanes)),
        parts_(part_count(arrays.pixels_per_token * tiles(arrays.tokens), threads)),
        cond_writes_(row_writes<D>(arrays.cond, arrays.tokens * arrays.pixels_per_token)) {}

  int parts() const { return parts_; }

  void lay_out(Arena& arena) {
    const int64_t chunk = arrays_.tokens < kTokenChunk ? arrays_.tokens : kTokenChunk;
    tokens_ = arena.take<Element>(tiles(chunk) * kTokenTile * elements_);
    panels_ = arena.take<Element>(parts_ * panel_size());
    packed_ = arena.take<int64_t>(parts_);
    if (!arena.counts_only()) std::fill_n(packed_, parts_, int64_t{-1});
    bias_ = take_floats(arena, arrays_.bias, int64_t{arrays_.pixels_per_token} * D, DType::kFloat32);
  }

  // Calls body(part, tile) for every tile, parts in parallel, with a dynamic schedule. `second`, if not null, is another
  // map from as many tokens to the same pixels; the body gets its tiles from second->matching_tile.
  template <class Body>
  void for_each_tile(Body&& body, const Upsample* second = nullptr) const {
    for_each_chunk(second, [&](int64_t begin, int64_t count) {
      SharedWork work(arrays_.pixels_per_token * tiles(count), parts_);
      parallel_matmuls<Operand, D>(parts_, [&](int part) {
        work.for_each_share([&](Range share) { run_share(begin, count, part, share, body); });
      });
    });
  }

  // SiLU(y) of a tile as an operand of the modulation matmul; writes y to `cond` if the caller wants it. Calls
  // prefetch(step, steps) before each of `steps` steps, for the caller's prefetches.
  template <class Prefetch>
  void load_silu_cond(const UpsampleTile<Operand>& tile, Element (*silu_cond)[kTokenTile], Prefetch&& prefetch) const {
    alignas(64) float cond[D][kTokenTile];
    load_cond(tile, prefetch, cond);
    // In a loop of its own: with 16 registers, its constants would displace sums of the matmul.
    for (int pixel = 0; pixel < tile.pixels(); pixel += kLanes)
      for (int d = 0; d < D; d += 2)
        put_silu<Operand, kTokenTile>(load(&cond[d][pixel]), load(&cond[d + 1][pixel]), d, pixel, silu_cond, nullptr);
    if (arrays_.cond.data != nullptr) store_cond(tile, cond);
  }

  // Writes y of a tile to `cond`.
  void store_cond(const UpsampleTile<Operand>& tile) const {
    alignas(64) float cond[D][kTokenTile];
    load_cond(tile, [](int, int) {}, cond);
    store_cond(tile, cond);
  }

  // panel += y of a tile.
  void add_to(const UpsampleTile<Operand>& tile, float (*panel)[kTokenTile]) const {
    multiply(
        tile, [](int, int) {},
        [&](const GroupSums& sums, int first, int pixel) DECO_INLINE_LAMBDA {
          unroll<2 * kGroup>(
              [&](auto i) DECO_INLINE_LAMBDA { accumulate(&panel[first + i / 2][pixel + i % 2 * kLanes], sums[i]); });
        });
  }

  // This map's tile of the same pixel and tokens as a tile of another map. Packs the weights of the pixel if the part
  // has packed those of another one.
  UpsampleTile<Operand> matching_tile(int part, const UpsampleTile<Operand>& other) const {
    Element* panel = panels_ + part * panel_size();
    if (packed_[part] != other.pixel) pack_panel(other.pixel, panel);
    packed_[part] = other.pixel;
    const int64_t first = other.first_token % kTokenChunk;
    const char* ahead = weight_row((int64_t{other.pixel} + 1) * D);
    return {other.pixel,
            other.count,
            other.first_token,
            panel,
            bias_ + other.pixel * D,
            tokens_ + first / kStrip * strip_size(),
            ahead,
            other.ahead == other.ahead_end ? ahead : weight_row((int64_t{other.pixel} + 2) * D)};
  }

 private:
  // cond = y of a tile.
  template <class Prefetch>
  void load_cond(const UpsampleTile<Operand>& tile, Prefetch&& prefetch, float (&cond)[D][kTokenTile]) const {
    multiply(tile, prefetch, [&](const GroupSums& sums, int first, int pixel) DECO_INLINE_LAMBDA {
      unroll<2 * kGroup>([&](auto i)
                             DECO_INLINE_LAMBDA { store(&cond[first + i / 2][pixel + i % 2 * kLanes], sums[i]); });
    });
  }

  void store_cond(const UpsampleTile<Operand>& tile, const float (&cond)[D][kTokenTile]) const {
    char* rows[kTokenTile];
    tile_addresses(arrays_.cond, tile, rows);
    store_rows<FloatOperand, D, kTokenTile>(arrays_.cond.dtype, cond, tile.count, rows, cond_writes_);
  }

  // Calls put(sums, first, pixel) with y of channels first .. first + kGroup - 1 and the strip at `pixel`.
  template <class Prefetch, class Put>
  DECO_INLINE void multiply(const UpsampleTile<Operand>& tile, Prefetch&& prefetch, Put&& put) const {
    const Panel<Operand, D> panel = panel_at(tile.weights);
    const int strips = tile.pixels() / kStrip, steps = strips * (D / kGroup);
    const int64_t lines = (tile.ahead_end - tile.ahead) / (strips * panel.steps(D)) / kCacheLine + 1;
    const char* ahead = tile.ahead;
    int step = 0;
    const auto prefetch_weights = [&]() DECO_INLINE_LAMBDA {
      for (int64_t line = 0; line < lines && ahead < tile.ahead_end; ++line, ahead += kCacheLine)
        __builtin_prefetch(ahead);
    };
    const auto start = [&](GroupSums& sums, int64_t first) DECO_INLINE_LAMBDA {
      prefetch(step++, steps);
      set_sums(sums, tile.bias + first, tile.bias + first + kGroup / 2);
    };
    for (int pixel = 0; pixel < tile.pixels(); pixel += kStrip) {
      const auto* tokens = reinterpret_cast<const Element(*)[kStrip]>(tile.tokens + pixel / kStrip * strip_size());
      panel.multiply(D, tokens, start, prefetch_weights, [&](const GroupSums& sums, int64_t first) DECO_INLINE_LAMBDA {
        put(sums, static_cast<int>(first), pixel);
      });
    }
  }

  Panel<Operand, D> panel_at(Element* panel) const { return {panel, elements_}; }

  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  static int64_t tiles(int64_t tokens) { return round_up(tokens, kTokenTile) / kTokenTile; }
  int64_t strip_size() const { return elements_ * kStrip; }
  int64_t panel_size() const { return elements_ * D; }

  const char* weight_row(int64_t row) const {
    return static_cast<const char*>(arrays_.weight.data) + row * arrays_.token_width * size_of(arrays_.weight.dtype);
  }

  // Calls body(first token, number of tokens) for every chunk after its tokens are packed, here and in `second`.
  template <class Body>
  void for_each_chunk(const Upsample* second, Body&& body) const {
    for (int64_t begin = 0; begin < arrays_.tokens; begin += kTokenChunk) {
      const int64_t left = arrays_.tokens - begin, count = left < kTokenChunk ? left : kTokenChunk;
      parallel_for(parts_, [&](int part) {
        const Range strips = share_of(round_up(count, kStrip) / kStrip, parts_, part);
        pack_strips(begin, count, strips);
        if (second != nullptr) second->pack_strips(begin, count, strips);
      });
      body(begin, count);
    }
  }

  void pack_strips(int64_t begin, int64_t count, Range strips) const {
    for (int64_t strip = strips.begin; strip < strips.end; ++strip)
      pack_strip(begin + strip * kStrip, begin + count - 1, tokens_ + strip * strip_size());
  }

  // Processes tiles `share` of a chunk, pixel by pixel.
  template <class Body>
  void run_share(int64_t begin, int64_t count, int part, Range share, Body&& body) const {
    const int64_t columns = tiles(count);
    Element* panel = panels_ + part * panel_size();
    int64_t packed = -1;
    for (int64_t item = share.begin; item < share.end; ++item) {
      const int64_t pixel = item / columns, first = item % columns * kTokenTile;
      if (pixel != packed) pack_panel(pixel, panel);
      packed = pixel;
      const int64_t left = count - first;
      const bool panel_ends = left <= kTokenTile && item + 1 < share.end;
      const char* ahead = weight_row((pixel + 1) * D);
      body(part, UpsampleTile<Operand>{static_cast<int>(pixel), static_cast<int>(left < kTokenTile ? left : kTokenTile),
                                       begin + first, panel, bias_ + pixel * D, tokens_ + first / kStrip * strip_size(),
                                       ahead, panel_ends ? weight_row((pixel + 2) * D) : ahead});
    }
  }

  // Transposes tokens first .. first + kStrip - 1; tokens beyond `last` repeat it.
  void pack_strip(int64_t first, int64_t last, Element* to) const {
    const Rows& tokens = arrays_.rows;
    with_dtype(tokens.dtype, [&](auto storage) {
      for (int half = 0; half < 2; ++half) {
        const char* rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t token = first + half * kLanes + i;
          rows[i] = static_cast<const char*>(tokens.data) +
                    (token < last ? token : last) * tokens.stride * size_of(storage.value);
        }
        for (int64_t element = 0; element < elements_; element += kLanes) {
          Vector square[kLanes];
          load_square<Operand, storage.value>(rows, element * Operand::kPack, arrays_.token_width, DType::kFloat32,
                                              square);
          transpose_square(square);
          unroll<kLanes>([&](auto e) DECO_INLINE_LAMBDA {
            Operand::store_vector(to + (element + e) * kStrip + half * kLanes, square[e]);
          });
        }
      }
    });
  }

  // Packs the weights of one pixel, rounded to the activation dtype.
  void pack_panel(int64_t pixel, Element* panel) const {
    with_dtype(arrays_.weight.dtype, [&](auto storage) {
      for (int d = 0; d < D; d += kLanes) {
        const char* rows[kLanes];
        for (int i = 0; i < kLanes; ++i) rows[i] = weight_row(pixel * D + d + i);
        for (int64_t element = 0; element < elements_; element += kLanes) {
          Vector square[kLanes];
          load_square<Operand, storage.value>(rows, element * Operand::kPack, arrays_.token_width, arrays_.rows.dtype,
                                              square);
          panel_at(panel).put_rows(d, element, square);
        }
      }
    });
  }

  const UpsampleArrays& arrays_;
  int64_t elements_;  // per row
  int parts_;
  RowWrites cond_writes_;
  Element* tokens_ = nullptr;    // [strips][elements][kStrip]
  Element* panels_ = nullptr;    // [parts], each a panel of D rows
  int64_t* packed_ = nullptr;    // [parts]: pixel of the part's panel in matching_tile, or -1
  const float* bias_ = nullptr;  // [P][D]
};

}  // namespace deco::cpu::DECO_CPU_ISA
