// Matmuls of small weight matrices with channel-major tiles of pixels.
//
// A tile holds T pixels as [channels][T], one pixel per vector lane: every per-channel weight is a broadcast, and
// LayerNorm, modulation and gates run over the channels without shuffles. One step of a matmul computes kGroup outputs
// x one strip of two vectors with all sums in registers; weights are read in place, row-major [out][in]. With AMX,
// products of a PairOperand are computed for all outputs of a strip at once, in tile registers (amx.h).
//
// An Operand defines the compute dtype of a matmul and the storage of its factors:
//   FloatOperand     one float per channel and pixel
//   PairOperand      two adjacent channels of a pixel as a pair of bfloat16 in 32 bits; products accumulate in float
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"
#if DECO_HAVE_AMX
#include "cpu/amx.h"
#endif

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kGroup = kLanes == 16 ? 8 : 4;  // outputs per step: 2 * kGroup sums fit in registers
constexpr int kStrip = 2 * kLanes;            // pixels per step

// `count` pixels rounded up to whole strips.
DECO_INLINE int whole_strips(int count) { return (count + kStrip - 1) / kStrip * kStrip; }

using GroupSums = VecF[2 * kGroup];  // [output][vector of the strip]

struct FloatOperand {
  using Element = float;
  using Vector = VecF;
  static constexpr int kPack = 1;  // channels per element
  static constexpr Accuracy kAccuracy = Accuracy::kFloat;

  static DECO_INLINE Vector load_vector(const Element* p) { return load(p); }
  static DECO_INLINE void store_vector(Element* p, Vector x) { store(p, x); }
  static DECO_INLINE Vector broadcast_element(Element x) { return broadcast(x); }
  static DECO_INLINE VecF multiply_add(Vector a, Vector b, VecF acc) { return fma(a, b, acc); }

  // Channels `channel` (even) and channel + 1 of a tile with T pixels.
  template <int T>
  static DECO_INLINE void put(Element (*tile)[T], int channel, int pixel, VecF first, VecF second) {
    store(&tile[channel][pixel], first);
    store(&tile[channel + 1][pixel], second);
  }
  template <int T>
  static DECO_INLINE void get(const Element (*tile)[T], int channel, int pixel, VecF& first, VecF& second) {
    first = load(&tile[channel][pixel]);
    second = load(&tile[channel + 1][pixel]);
  }
};

#if DECO_HAVE_BF16_DOT
struct PairOperand {
  using Element = uint32_t;
  using Vector = VecPair;
  static constexpr int kPack = 2;
  static constexpr Accuracy kAccuracy = Accuracy::kBFloat16;

  static DECO_INLINE Vector load_vector(const Element* p) { return load_pairs(p); }
  static DECO_INLINE void store_vector(Element* p, Vector x) { store_pairs(p, x); }
  static DECO_INLINE Vector broadcast_element(Element x) { return broadcast_pair(x); }
  static DECO_INLINE VecF multiply_add(Vector a, Vector b, VecF acc) { return dot_pairs(acc, a, b); }

  template <int T>
  static DECO_INLINE void put(Element (*tile)[T], int channel, int pixel, VecF first, VecF second) {
    store_pairs(&tile[channel / 2][pixel], make_pairs(first, second));
  }
  template <int T>
  static DECO_INLINE void get(const Element (*tile)[T], int channel, int pixel, VecF& first, VecF& second) {
    const Vector pairs = load_pairs(&tile[channel / 2][pixel]);
    first = first_of_pairs(pairs);
    second = second_of_pairs(pairs);
  }

  // Puts the pairs of rows 2 pair and 2 pair + 1, at columns d .., into a matrix [R][D] for matmuls with the transpose:
  // [R / 2][D], or the rows [D][R / 2] of a tile of AMX.
  template <int D, int R>
  static DECO_INLINE void put_transposed(Element* matrix, int pair, int d, Vector pairs) {
#if DECO_HAVE_AMX
    Element column[kLanes];
    store_pairs(column, pairs);
    for (int i = 0; i < kLanes; ++i) matrix[(d + i) * (R / 2) + pair] = column[i];
#else
    store_pairs(matrix + pair * D + d, pairs);
#endif
  }
};
#endif

// Whether matmuls with this Operand run in the tile registers of AMX.
#if DECO_HAVE_AMX
template <class Operand>
constexpr bool kUsesTiles = Operand::kPack == 2;
#else
template <class Operand>
constexpr bool kUsesTiles = false;
#endif

// sums[o][v] += sum over k < kElements of w(o, k) * x[k][v], with
//   w(o, k) = (o < kGroup/2 ? low : high)[(o mod kGroup/2) * kOutStride + k * kInStride].
// The two halves of the outputs may use non-adjacent rows of the matrix.
template <class Operand, int kElements, int kOutStride, int kInStride, int T>
DECO_INLINE void multiply_add(GroupSums& sums, const typename Operand::Element* low,
                              const typename Operand::Element* high, const typename Operand::Element (*x)[T]) {
  const typename Operand::Element* column = x[0];
#pragma GCC unroll 2
  for (int k = 0; k < kElements; ++k, column += T) {
    const auto x0 = Operand::load_vector(column), x1 = Operand::load_vector(column + kLanes);
    unroll<kGroup>([&](auto o) DECO_INLINE_LAMBDA {
      constexpr int kHalf = kGroup / 2, kRow = o % kHalf;
      const auto* row = (o < kHalf ? low : high) + kRow * kOutStride;
      const auto w = Operand::broadcast_element(row[k * kInStride]);
      sums[2 * o] = Operand::multiply_add(w, x0, sums[2 * o]);
      sums[2 * o + 1] = Operand::multiply_add(w, x1, sums[2 * o + 1]);
    });
  }
}

DECO_INLINE void set_sums(GroupSums& sums, const float* low, const float* high) {
  unroll<kGroup>([&](auto o) DECO_INLINE_LAMBDA {
    constexpr int kHalf = kGroup / 2;
    sums[2 * o] = sums[2 * o + 1] = broadcast((o < kHalf ? low : high)[o % kHalf]);
  });
}

DECO_INLINE void clear_sums(GroupSums& sums) {
  unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA { sums[i] = broadcast(0.0f); });
}

enum class Layout { kRows, kTransposed };

// W x on the strip that starts at x, with W [kOut][kIn] in rows, or transposed in the layout of take_transposed.
template <class Operand, int kOut, int kIn, int T, Layout kLayout>
class Product {
 public:
  using Element = typename Operand::Element;

  DECO_INLINE Product(const Element* weight, const Element (*x)[T]) : weight_(weight), x_(x) {}

  // sums += W x for kGroup / 2 outputs from `low` on, then kGroup / 2 from `high` on.
  DECO_INLINE void add_to(GroupSums& sums, int low, int high) const {
    multiply_add<Operand, kElements, kOutStride, kInStride, T>(sums, weight_ + low * kOutStride,
                                                               weight_ + high * kOutStride, x_);
  }

 private:
  static constexpr int kElements = kIn / Operand::kPack;
  static constexpr int kOutStride = kLayout == Layout::kRows ? kElements : 1;
  static constexpr int kInStride = kLayout == Layout::kRows ? 1 : kOut;

  const Element* weight_;
  const Element (*x_)[T];
};

#if DECO_HAVE_AMX
static_assert(kStrip == 2 * kTileRows, "a strip is two tiles of columns");

// Computed at once and kept.
template <int kOut, int kIn, int T, Layout kLayout>
class Product<PairOperand, kOut, kIn, T, kLayout> {
 public:
  DECO_INLINE Product(const uint32_t* weight, const uint32_t (*x)[T]) {
    constexpr int kPairs = kIn / 2, K = kPairs % 16 == 0 ? 16 : 8;
    tile_matmul<K, kOut, kStrip>(kPairs, {weight, kPairs}, {x[0], T}, {y_[0], kStrip});
  }

  DECO_INLINE void add_to(GroupSums& sums, int low, int high) const {
    unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA {
      constexpr int kHalf = kGroup / 2, kRow = i / 2 % kHalf;
      sums[i] = sums[i] + load(&y_[(i / 2 < kHalf ? low : high) + kRow][i % 2 * kLanes]);
    });
  }

 private:
  alignas(64) float y_[kOut][kStrip];
};
#endif

// W x on a strip with W [kOut][kIn] in rows.
template <class Operand, int kOut, int kIn, int T>
DECO_INLINE auto product(const typename Operand::Element* weight, const typename Operand::Element (*x)[T]) {
  return Product<Operand, kOut, kIn, T, Layout::kRows>(weight, x);
}

// The same with the transposed weights of take_transposed.
template <class Operand, int kOut, int kIn, int T>
DECO_INLINE auto transposed_product(const typename Operand::Element* weight, const typename Operand::Element (*x)[T]) {
  return Product<Operand, kOut, kIn, T, Layout::kTransposed>(weight, x);
}

// sums = bias + product for outputs `first` .. first + kGroup - 1.
template <class AnyProduct>
DECO_INLINE void linear(GroupSums& sums, const AnyProduct& product, const float* bias, int first) {
  set_sums(sums, bias + first, bias + first + kGroup / 2);
  product.add_to(sums, first, first + kGroup / 2);
}

// Calls body(product, first, pixel) for every kGroup of D outputs, from `first` on, on every strip of the pixels;
// product_at(pixel) is the product on a strip. Each product is made once if that computes it; otherwise a group's
// weights serve one strip after the other.
template <class Operand, int D, class ProductAt, class Body>
DECO_INLINE void for_each_group(int pixels, ProductAt&& product_at, Body&& body) {
  if constexpr (kUsesTiles<Operand>) {
    for (int pixel = 0; pixel < pixels; pixel += kStrip) {
      const auto product = product_at(pixel);
      for (int first = 0; first < D; first += kGroup) body(product, first, pixel);
    }
  } else {
    for (int first = 0; first < D; first += kGroup)
      for (int pixel = 0; pixel < pixels; pixel += kStrip) body(product_at(pixel), first, pixel);
  }
}

// State of a thread that computes matmuls: configured tile registers, or nothing.
template <class Operand, int D>
struct MatmulUnit {};
#if DECO_HAVE_AMX
template <int D>
struct MatmulUnit<PairOperand, D> {
  static_assert(D == 16 || D % 32 == 0, "Product takes steps of the K pairs that are configured");
  TileRegisters<kTilePairs<D>> registers;
};
#endif

// parallel_for of parts that compute matmuls of a decoder of width D.
template <class Operand, int D, class Function>
void parallel_matmuls(int parts, Function&& function) {
  parallel_for(parts, [&](int part) {
    [[maybe_unused]] const MatmulUnit<Operand, D> unit;
    function(part);
  });
}

// The strip of a tile that starts at pixel `pixel`, indexed by channel.
template <class Element, int T>
DECO_INLINE auto strip_of(const Element (*tile)[T], int pixel) -> const Element (*)[T] {
  return reinterpret_cast<const Element(*)[T]>(&tile[0][pixel]);
}

// ---- matmuls that sum over the pixels: gradients of weight matrices ------------------------------------------------
//
// grad_weight[o][k] += sum over pixels p of d[o][p] x[p][k]: d is broadcast, x is pixel-major, and elements of a
// PairOperand hold two adjacent pixels instead of two channels.

// Gradient with respect to R channels in two layouts: by_channel for matmuls with transposed weights, by_pixel as the
// factor d above.
template <class Operand, int R, int T>
struct alignas(64) GradientTile;

template <int R, int T>
struct alignas(64) GradientTile<FloatOperand, R, T> {
  float by_channel[R][T];

  const float (*by_pixel() const)[T] { return by_channel; }

  // Channels `channel` (even) and channel + 1 on the strip at `pixel`.
  DECO_INLINE void put_strip(int channel, int pixel, const VecF (&first)[2], const VecF (&second)[2]) {
    unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
      FloatOperand::put(by_channel, channel, pixel + v * kLanes, first[v], second[v]);
    });
  }
};

// Channel-major tile [D][T] -> [T][D].
template <int D, int T>
void make_pixel_major(FloatOperand, const float (*tile)[T], int pixels, float (*x)[D]) {
  for (int pixel = 0; pixel < pixels; pixel += kLanes)
    for (int d = 0; d < D; d += kLanes) {
      VecF square[kLanes];
      unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { square[i] = load(&tile[d + i][pixel]); });
      transpose(square);
      unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA { store(&x[pixel + i][d], square[i]); });
    }
}

#if DECO_HAVE_BF16_DOT
template <int R, int T>
struct alignas(64) GradientTile<PairOperand, R, T> {
  uint32_t by_channel[R / 2][T];
  uint32_t pixel_pairs[R][T / 2];

  const uint32_t (*by_pixel() const)[T / 2] { return pixel_pairs; }

  DECO_INLINE void put_strip(int channel, int pixel, const VecF (&first)[2], const VecF (&second)[2]) {
    unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
      PairOperand::put(by_channel, channel, pixel + v * kLanes, first[v], second[v]);
    });
    store_pairs(&pixel_pairs[channel][pixel / 2], join_runs(first[0], first[1]));
    store_pairs(&pixel_pairs[channel + 1][pixel / 2], join_runs(second[0], second[1]));
  }
};

// Pairs of channels [D/2][T] -> pairs of pixels [T/2][D]. `square` holds the pairs of up to 32 channels.
template <int D, int T>
void make_pixel_major(PairOperand, const uint32_t (*tile)[T], int pixels, uint32_t (*x)[D]) {
  constexpr int kRows = D / 2 < kLanes ? D / 2 : kLanes;
  for (int pixel = 0; pixel < pixels; pixel += kLanes)
    for (int row = 0; row < D / 2; row += kRows) {
      VecPair square[kLanes];
      unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
        square[i] = i < kRows ? load_pairs(&tile[row + i % kRows][pixel]) : broadcast_pair(0);
      });
      transpose_pairs(square);
      unroll<kLanes / 2>([&](auto i) DECO_INLINE_LAMBDA {
        const InterleavedRuns pairs = interleave_runs(square[2 * i], square[2 * i + 1]);
        uint32_t* to = &x[pixel / 2 + i][2 * row];
        store_pairs(to, pairs.low);
        if constexpr (kRows == kLanes) store_pairs(to + kLanes, pairs.high);
      });
    }
}
#endif

#if DECO_HAVE_AMX
// The sum over the pixels starts at zero and is then added to grad_weight.
template <int R, int D, int T>
void add_pair_gradient(const uint32_t (*d)[T / 2], const uint32_t (*x)[D], int pixels, float (*grad_weight)[D]) {
  constexpr int kVectors = D / kLanes < 2 ? 1 : 2, kColumns = kVectors * kLanes;
  for (int k = 0; k < D; k += kColumns) {
    alignas(64) float sums[R][kColumns];
    tile_matmul<kTilePairs<D>, R, kColumns>(pixels / 2, {d[0], T / 2}, {&x[0][k], D}, {sums[0], kColumns});
    for (int o = 0; o < R; ++o)
      unroll<kVectors>(
          [&](auto v) DECO_INLINE_LAMBDA { accumulate(&grad_weight[o][k + v * kLanes], load(&sums[o][v * kLanes])); });
  }
}
#endif

// grad_weight [R][D] += d x over the first `pixels` pixels.
template <class Operand, int R, int D, int T>
void add_weight_gradient(const typename Operand::Element (*d)[T / Operand::kPack],
                         const typename Operand::Element (*x)[D], int pixels, float (*grad_weight)[D]) {
#if DECO_HAVE_AMX
  if constexpr (kUsesTiles<Operand>) return add_pair_gradient<R, D, T>(d, x, pixels, grad_weight);
#endif
  constexpr int kVectors = D / kLanes < 2 ? 1 : 2;
  for (int o = 0; o < R; o += kGroup)
    for (int k = 0; k < D; k += kVectors * kLanes) {
      VecF sums[kGroup * kVectors];
      unroll<kGroup * kVectors>([&](auto i) DECO_INLINE_LAMBDA { sums[i] = broadcast(0.0f); });
      const typename Operand::Element* row = d[o];
#pragma GCC unroll 2
      for (int p = 0; p < pixels / Operand::kPack; ++p) {
        typename Operand::Vector factor[kVectors];
        unroll<kVectors>([&](auto v) DECO_INLINE_LAMBDA { factor[v] = Operand::load_vector(&x[p][k + v * kLanes]); });
        unroll<kGroup>([&](auto i) DECO_INLINE_LAMBDA {
          const auto gradient = Operand::broadcast_element(row[i * (T / Operand::kPack) + p]);
          unroll<kVectors>([&](auto v) DECO_INLINE_LAMBDA {
            sums[i * kVectors + v] = Operand::multiply_add(gradient, factor[v], sums[i * kVectors + v]);
          });
        });
      }
      unroll<kGroup * kVectors>([&](auto i) DECO_INLINE_LAMBDA {
        accumulate(&grad_weight[o + i / kVectors][k + i % kVectors * kLanes], sums[i]);
      });
    }
}

}  // namespace deco::cpu::DECO_CPU_ISA
