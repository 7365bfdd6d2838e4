// Matmuls of bfloat16 pairs in the tile registers of AMX (matmul.h).
//
// One tdpbf16ps adds A B to a tile C of 16 x 16 floats, with A [16][K] and B [K][16] in pairs of bfloat16: A is part of
// row-major rows of pairs, B of rows of columns. K is 16, or 8 where a sum has only 8 pairs. Products are exact and
// accumulate in float: those of the first and of the second values of the K pairs apart, then both with C. Subnormal
// factors count as zero, as in dot_pairs. A column of B reaches only its column of C: a NaN of one pixel stays there.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kTileRows = 16;

// Pairs per step where the shortest sum is over D values.
template <int D>
constexpr int kTilePairs = D < 32 ? 8 : 16;

// Operand of ldtilecfg. Registers 0 to 3 hold 2 x 2 tiles of C, 4 and 5 two of A, 6 and 7 two of B.
template <int K>
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 4 * K, 4 * K, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, K, K};
};

// Configures the tile registers of this thread for steps of K pairs, until the end of its life; PyTorch's matmuls on the
// same thread configure them in their own way.
template <int K>
class TileRegisters {
 public:
  TileRegisters() {
    // Constant: GCC takes only the first bytes of the operand for read, and drops stores to the others.
    static constexpr TileConfiguration<K> kConfiguration;
    _tile_loadconfig(&kConfiguration);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// A matrix of pairs or floats with rows `stride` elements apart.
template <class Element>
struct TileMatrix {
  Element* data;
  int64_t stride;

  DECO_INLINE Element* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  DECO_INLINE int64_t row_bytes() const { return stride * int64_t{sizeof(Element)}; }
};
using TilePairs = TileMatrix<const uint32_t>;
using TileSums = TileMatrix<float>;

// C = A B, or C += A B if `adds`, for kRows x kColumns tiles of C and sums over `pairs`, a multiple of K. Calls
// before_step() before each K pairs. The numbers of registers must be literals.
template <int K, int kRows, int kColumns, class BeforeStep>
DECO_INLINE void tile_block(int64_t pairs, TilePairs a, TilePairs b, TileSums c, bool adds, BeforeStep&& before_step) {
  constexpr bool kTwoRows = kRows == 2, kTwoColumns = kColumns == 2;
  __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read memory
  if (adds) {
    _tile_loadd(0, c.at(0, 0), c.row_bytes());
    if constexpr (kTwoColumns) _tile_loadd(1, c.at(0, kTileRows), c.row_bytes());
    if constexpr (kTwoRows) _tile_loadd(2, c.at(kTileRows, 0), c.row_bytes());
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c.at(kTileRows, kTileRows), c.row_bytes());
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < pairs; k += K) {
    before_step();
    _tile_loadd(4, a.at(0, k), a.row_bytes());
    _tile_loadd(6, b.at(k, 0), b.row_bytes());
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) _tile_loadd(7, b.at(k, kTileRows), b.row_bytes());
    if constexpr (kTwoColumns) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoRows) _tile_loadd(5, a.at(kTileRows, k), a.row_bytes());
    if constexpr (kTwoRows) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.at(0, 0), c.row_bytes());
  if constexpr (kTwoColumns) _tile_stored(1, c.at(0, kTileRows), c.row_bytes());
  if constexpr (kTwoRows) _tile_stored(2, c.at(kTileRows, 0), c.row_bytes());
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c.at(kTileRows, kTileRows), c.row_bytes());
}

// C = A B with A [kRows][pairs] and B [pairs][kColumns].
template <int K, int kRows, int kColumns>
DECO_INLINE void tile_matmul(int64_t pairs, TilePairs a, TilePairs b, TileSums c) {
  constexpr int kColumnTiles = kColumns / kTileRows, kBlockRows = 2 * kTileRows;
  static_assert(kRows % kTileRows == 0 && kColumnTiles * kTileRows == kColumns && kColumnTiles <= 2);
  int row = 0;
  for (; row + kBlockRows <= kRows; row += kBlockRows)
    tile_block<K, 2, kColumnTiles>(pairs, {a.at(row, 0), a.stride}, b, {c.at(row, 0), c.stride}, false, [] {});
  if constexpr (kRows % kBlockRows != 0)
    tile_block<K, 1, kColumnTiles>(pairs, {a.at(row, 0), a.stride}, b, {c.at(row, 0), c.stride}, false, [] {});
}

}  // namespace deco::cpu::DECO_CPU_ISA
