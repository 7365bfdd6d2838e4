// Rows of D neighbouring values in memory <-> channel-major tiles [D][T]. rows[i] is the address of row i.
#pragma once

#include "cpu/matmul.h"

namespace deco::cpu::DECO_CPU_ISA {

// tile[d][i] = value d of row i for i < pixels; all those rows must be readable.
template <int D, int T>
void load_rows(DType dtype, const char* const (&rows)[T], int pixels, float (*tile)[T]) {
  with_dtype(dtype, [&](auto storage) {
    for (int pixel = 0; pixel < pixels; pixel += kLanes)
      for (int d = 0; d < D; d += kLanes) {
        VecF square[kLanes];
        unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { square[i] = load_as<storage.value>(rows[pixel + i], d); });
        transpose(square);
        unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { store(&tile[d + i][pixel], square[i]); });
      }
  });
}

// The reverse, for i < count, from a tile of the operand's elements.
template <class Operand, int D, int T>
void store_rows(DType dtype, const typename Operand::Element (*tile)[T], int count, char* const (&rows)[T]) {
  with_dtype(dtype, [&](auto storage) {
    for (int pixel = 0; pixel < count; pixel += kLanes)
      for (int d = 0; d < D; d += kLanes) {
        VecF square[kLanes];
        unroll<kLanes / 2>([&](auto i) DECO_INLINE_LAMBDA {
          Operand::get(tile, d + 2 * i, pixel, square[2 * i], square[2 * i + 1]);
        });
        transpose(square);
        unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
          if (pixel + i < count) store_as<storage.value>(rows[pixel + i], d, square[i]);
        });
      }
  });
}

// Starts to fetch rows first .. first + T - 1 into the second-level cache, as far as there are `total` rows.
template <int D, int T>
void prefetch_rows(const Rows& rows, int64_t first, int64_t total) {
  constexpr int64_t kLineBytes = 64;
  const int64_t end = first + T < total ? first + T : total, bytes = size_of(rows.dtype);
  for (int64_t row = first; row < end; ++row) {
    const char* address = static_cast<const char*>(rows.data) + row * rows.stride * bytes;
    for (int64_t offset = 0; offset < D * bytes; offset += kLineBytes) __builtin_prefetch(address + offset, 0, 2);
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
