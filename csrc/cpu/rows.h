// Loads and stores between rows of D contiguous values and channel-major tiles [D][T]. rows[i] is the address of row i.
#pragma once

#include "cpu/matmul.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kCacheLine = 64;  // bytes

// How rows are written: through the caches or with streaming stores.
enum class RowWrites { kCached, kStreamed };

// How to write `rows` rows of D values that start at `data` and are `strides` apart. Streaming requires that one vector
// store fills a cache line.
template <int D, class... Strides>
RowWrites row_writes(DType dtype, const void* data, int64_t rows, Strides... strides) {
#if DECO_HAVE_BF16_DOT
  const bool line_per_store = dtype != DType::kFloat16;
#else
  const bool line_per_store = kLanes * sizeof(float) == kCacheLine && dtype == DType::kFloat32;
#endif
  const int64_t bytes = size_of(dtype);
  const int64_t places = reinterpret_cast<intptr_t>(data) | D * bytes | (... | (strides * bytes));
  const bool streamed = line_per_store && rows * D * bytes >= kStreamingBytes && places % kCacheLine == 0;
  return streamed ? RowWrites::kStreamed : RowWrites::kCached;
}
template <int D>
RowWrites row_writes(const Rows& to, int64_t rows) {
  return row_writes<D>(to.dtype, to.data, rows, to.stride);
}
template <int D>
RowWrites row_writes(const PixelRows& to, int64_t rows) {
  return row_writes<D>(to.dtype, to.data, rows, to.token_stride, to.pixel_stride);
}

#if DECO_HAVE_BF16_DOT
// bfloat16 rows are moved 32 values (one cache line) at a time, so that every line is accessed once.
// square[i] = channels d + 2i and d + 2i + 1 of rows pixel .. pixel + kLanes - 1.
template <int T>
DECO_INLINE void load_bf16_square(const char* const (&rows)[T], int pixel, int d, VecPair (&square)[kLanes]) {
  unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
    square[i] = load_pairs(reinterpret_cast<const uint32_t*>(rows[pixel + i]) + d / 2);
  });
  transpose_pairs(square);
}

template <int D, int T>
void load_bf16_rows(const char* const (&rows)[T], int pixels, float (*tile)[T]) {
  for (int pixel = 0; pixel < pixels; pixel += kLanes)
    for (int d = 0; d < D; d += 2 * kLanes) {
      VecPair square[kLanes];
      load_bf16_square(rows, pixel, d, square);
      unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
        store(&tile[d + 2 * i][pixel], first_of_pairs(square[i]));
        store(&tile[d + 2 * i + 1][pixel], second_of_pairs(square[i]));
      });
    }
}

template <RowWrites kWrites, class Operand, int D, int T>
void store_bf16_rows(const typename Operand::Element (*tile)[T], int count, char* const (&rows)[T]) {
  for (int pixel = 0; pixel < count; pixel += kLanes)
    for (int d = 0; d < D; d += 2 * kLanes) {
      VecPair square[kLanes];
      unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
        VecF first, second;
        Operand::get(tile, d + 2 * i, pixel, first, second);
        square[i] = make_pairs(first, second);
      });
      transpose_pairs(square);
      unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
        if (pixel + i >= count) return;
        auto* to = reinterpret_cast<uint32_t*>(rows[pixel + i]) + d / 2;
        if constexpr (kWrites == RowWrites::kStreamed) {
          store_pairs_streaming(to, square[i]);
        } else {
          store_pairs(to, square[i]);
        }
      });
    }
}
#endif

// tile[d][i] = value d of row i for i < pixels; all of these rows must be readable.
template <int D, int T>
void load_rows(DType dtype, const char* const (&rows)[T], int pixels, float (*tile)[T]) {
#if DECO_HAVE_BF16_DOT
  if constexpr (D % (2 * kLanes) == 0)
    if (dtype == DType::kBFloat16) return load_bf16_rows<D, T>(rows, pixels, tile);
#endif
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

template <RowWrites kWrites, class Operand, int D, int T>
void store_rows_as(DType dtype, const typename Operand::Element (*tile)[T], int count, char* const (&rows)[T]) {
#if DECO_HAVE_BF16_DOT
  if constexpr (D % (2 * kLanes) == 0)
    if (dtype == DType::kBFloat16) return store_bf16_rows<kWrites, Operand, D, T>(tile, count, rows);
#endif
  with_dtype(dtype, [&](auto storage) {
    for (int pixel = 0; pixel < count; pixel += kLanes)
      for (int d = 0; d < D; d += kLanes) {
        VecF square[kLanes];
        unroll<kLanes / 2>(
            [&](auto i) DECO_INLINE_LAMBDA { Operand::get(tile, d + 2 * i, pixel, square[2 * i], square[2 * i + 1]); });
        transpose(square);
        unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
          if (pixel + i >= count) return;
          if constexpr (kWrites == RowWrites::kStreamed && storage.value == DType::kFloat32) {
            store_streaming(reinterpret_cast<float*>(rows[pixel + i]) + d, square[i]);
          } else {
            store_as<storage.value>(rows[pixel + i], d, square[i]);
          }
        });
      }
  });
}

// Inverse of load_rows for i < count, from a tile of the Operand's elements.
template <class Operand, int D, int T>
void store_rows(DType dtype, const typename Operand::Element (*tile)[T], int count, char* const (&rows)[T],
                RowWrites writes) {
  constexpr auto kStreamed = RowWrites::kStreamed, kCached = RowWrites::kCached;
  if (writes == kStreamed) return store_rows_as<kStreamed, Operand, D, T>(dtype, tile, count, rows);
  store_rows_as<kCached, Operand, D, T>(dtype, tile, count, rows);
}

// Functions that only prefetch are always inlined: GCC takes them for functions without effect and drops their calls.

// Prefetches share `step` of `steps` of the rows of D values into the L2 cache.
template <int D, int T>
DECO_INLINE void prefetch_rows(DType dtype, const char* const (&rows)[T], int step, int steps) {
  for (int i = T * step / steps; i < T * (step + 1) / steps; ++i)
    for (int64_t byte = 0; byte < D * size_of(dtype); byte += kCacheLine) __builtin_prefetch(rows[i] + byte, 0, 2);
}

// Prefetches rows first .. first + T - 1, up to row total - 1, into the L2 cache.
template <int D, int T>
DECO_INLINE void prefetch_rows(const Rows& rows, int64_t first, int64_t total) {
  const int64_t end = first + T < total ? first + T : total, bytes = size_of(rows.dtype);
  for (int64_t row = first; row < end; ++row) {
    const char* address = static_cast<const char*>(rows.data) + row * rows.stride * bytes;
    for (int64_t offset = 0; offset < D * bytes; offset += kCacheLine) __builtin_prefetch(address + offset, 0, 2);
  }
}

}  // namespace deco::cpu::DECO_CPU_ISA
