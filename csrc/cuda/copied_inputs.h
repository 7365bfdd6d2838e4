// Inputs of a warp that asynchronous copies bring to shared memory ahead of their use.
#pragma once

#include <type_traits>

#include "cuda/pixels.h"

namespace deco::cuda {

// The inputs of a step of block_backward.cu: s, h, the gradients of h' and of s, and the condition.
enum Input { kInputS, kInputH, kInputGrad, kInputGradS, kInputCond, kInputs };

// Of a tile of 16 pixels, in shared memory of the warp: [input][D / 16][lanes][16 bytes], each a left operand in its
// register layout (pixels.h) or the lane's quarters of two rows. A lane copies what it reads itself, so that it needs no
// barrier.
template <int D>
struct CopiedInputs {
  using Piece = std::conditional_t<D == 16, Words2, Words4>;               // of a lane's quarter of a row
  static constexpr int kPieces = D / 2 / static_cast<int>(sizeof(Piece));  // in that quarter
  static constexpr int kWords = kInputs * kTileWords<D>, kBytes = 16 * kWords;

  Words4* memory;

  DECO_DEVICE Words4* of(int input) const { return memory + input * kTileWords<D>; }
  // Piece 0 of the lane's row r; the other pieces are 32 pieces apart.
  DECO_DEVICE Piece* row_place(int input, int r) const {
    return reinterpret_cast<Piece*>(of(input)) + 32 * kPieces * r + lane();
  }

  DECO_DEVICE void copy_tile(int input, const void* tiles, uint32_t tile) const {
    const Words4* from = static_cast<const Words4*>(tiles) + (int64_t{tile} * kTileWords<D> + lane());
#pragma unroll
    for (int k = 0; k < D / 16; ++k) copy_async(of(input) + 32 * k + lane(), from + 32 * k);
  }
  template <class T, class AnyRows>
  DECO_DEVICE void copy_rows(int input, const AnyRows& rows, const uint32_t (&pixel)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto* from = reinterpret_cast<const Piece*>(rows.template at<T>(pixel[r], lane_channel<D>()));
#pragma unroll
      for (int i = 0; i < kPieces; ++i) copy_async(row_place(input, r) + 32 * i, from + i);
    }
  }
  DECO_DEVICE Operand<D> tile(int input) const { return load_tile<D>(of(input), 0); }
  DECO_DEVICE RowWords<D> row(int input, int r) const { return load_row<D>(row_place(input, r), 32); }
};

}  // namespace deco::cuda
