// Matmuls of a packed matrix, a panel, with packed strips of columns: strip [elements][kStrip]. Sums over the elements
// may be long; both factors are then read linearly.
//
// A panel holds rows of `elements` elements (matmul.h), a multiple of kLanes, as [groups][elements][kGroup], or with AMX
// row by row, [rows][elements], for PairOperand. It is packed in squares of kLanes rows x kLanes elements.
#pragma once

#include "cpu/matmul.h"

namespace deco::cpu::DECO_CPU_ISA {

DECO_INLINE void transpose_square(VecF (&square)[kLanes]) { transpose(square); }
#if DECO_HAVE_BF16_DOT
DECO_INLINE void transpose_square(VecPair (&square)[kLanes]) { transpose_pairs(square); }
#endif

// D: as in parallel_matmuls.
template <class Operand, int D>
struct Panel {
  using Element = typename Operand::Element;
  using Square = typename Operand::Vector (&)[kLanes];

  Element* data;
  int64_t elements;

  // square[i] = elements `element` .. of row `row` + i.
  DECO_INLINE void put_rows(int64_t row, int64_t element, Square square) const {
    transpose_square(square);
    put_columns(row, element, square);
  }

  // square[i] = element `element` + i of rows `row` ..
  DECO_INLINE void put_columns(int64_t row, int64_t element, Square square) const {
    Element column[kLanes];
    unroll<kLanes>([&](auto e) DECO_INLINE_LAMBDA {
      Operand::store_vector(column, square[e]);
      for (int group = 0; group < kLanes / kGroup; ++group)
        std::memcpy(data + ((row / kGroup + group) * elements + element + e) * kGroup, column + group * kGroup,
                    kGroup * sizeof(Element));
    });
  }

  // For each kGroup of `rows` rows: start(sums, row), sums += rows x strip, put(sums, row). Calls before_step()
  // `steps(rows)` times.
  template <class Start, class BeforeStep, class Put>
  DECO_INLINE void multiply(int64_t rows, const Element (*strip)[kStrip], Start&& start, BeforeStep&& before_step,
                            Put&& put) const {
    for (int64_t row = 0; row < rows; row += kGroup) {
      GroupSums sums;
      start(sums, row);
      const Element* group = data + row * elements;
      for (int64_t element = 0; element < elements; element += kLanes) {
        before_step();
        multiply_add<Operand, kLanes, 1, kGroup, kStrip>(sums, group + element * kGroup,
                                                         group + element * kGroup + kGroup / 2, strip + element);
      }
      put(sums, row);
    }
  }

  int64_t steps(int64_t rows) const { return rows / kGroup * (elements / kLanes); }
};

#if DECO_HAVE_AMX
template <int D>
struct Panel<PairOperand, D> {
  using Square = VecPair (&)[kLanes];

  uint32_t* data;
  int64_t elements;

  DECO_INLINE void put_rows(int64_t row, int64_t element, Square square) const {
    unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { store_pairs(data + (row + i) * elements + element, square[i]); });
  }

  DECO_INLINE void put_columns(int64_t row, int64_t element, Square square) const {
    transpose_square(square);
    put_rows(row, element, square);
  }

  template <class Start, class BeforeStep, class Put>
  DECO_INLINE void multiply(int64_t rows, const uint32_t (*strip)[kStrip], Start&& start, BeforeStep&& before_step,
                            Put&& put) const {
    alignas(64) float products[kBlockRows][kStrip];
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      const TilePairs block = {data + first * elements, elements};
      const bool whole = first + kBlockRows <= rows;
      if (whole) {
        tile_block<K, 2, 2>(elements, block, {strip[0], kStrip}, {products[0], kStrip}, false, before_step);
      } else {
        tile_block<K, 1, 2>(elements, block, {strip[0], kStrip}, {products[0], kStrip}, false, before_step);
      }
      for (int64_t row = 0; row < (whole ? kBlockRows : kTileRows); row += kGroup) {
        GroupSums sums;
        start(sums, first + row);
        unroll<2 * kGroup>(
            [&](auto i) DECO_INLINE_LAMBDA { sums[i] = sums[i] + load(&products[row + i / 2][i % 2 * kLanes]); });
        put(sums, first + row);
      }
    }
  }

  int64_t steps(int64_t rows) const { return (rows + kBlockRows - 1) / kBlockRows * (elements / K); }

 private:
  static constexpr int kBlockRows = 2 * kTileRows, K = kTilePairs<D>;
};
#endif

}  // namespace deco::cpu::DECO_CPU_ISA
