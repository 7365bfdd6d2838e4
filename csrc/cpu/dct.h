// 8-point DCT-II on rows of 8x8 blocks.
//
// A BlockRow holds kRowPixels adjacent pixels of one image row: one row of kRowBlocks 8x8 blocks side by side (two with
// AVX-512, otherwise one). Eight BlockRows hold whole 8x8 blocks. The transform runs down the columns, one column per
// lane; transpose_blocks prepares the other direction.
//
// Coefficient k omits the factor that makes it orthonormal and may have the opposite sign, so that every sum has one
// factor of 1. Callers fold dct_square_norm into the weights of the squared coefficients.
#pragma once

#include "cpu/vec.h"

namespace deco::cpu::DECO_CPU_ISA {

constexpr int kBlock = 8;

#if DECO_LANES == 4

// Eight pixels in two vectors of four.
struct BlockRow {
  VecF left, right;
};
DECO_INLINE BlockRow operator+(BlockRow a, BlockRow b) { return {a.left + b.left, a.right + b.right}; }
DECO_INLINE BlockRow operator-(BlockRow a, BlockRow b) { return {a.left - b.left, a.right - b.right}; }
DECO_INLINE BlockRow operator*(BlockRow a, BlockRow b) { return {a.left * b.left, a.right * b.right}; }
DECO_INLINE BlockRow fma(BlockRow a, BlockRow b, BlockRow c) {
  return {fma(a.left, b.left, c.left), fma(a.right, b.right, c.right)};
}
DECO_INLINE float sum(BlockRow x) { return sum(x.left + x.right); }
DECO_INLINE BlockRow broadcast_row(float x) { return {broadcast(x), broadcast(x)}; }
DECO_INLINE BlockRow load_row(const float* p) { return {load(p), load(p + kLanes)}; }
DECO_INLINE void store_row(float* p, BlockRow x) {
  store(p, x.left);
  store(p + kLanes, x.right);
}

constexpr int kRowPixels = 2 * kLanes;

DECO_INLINE void transpose_blocks(BlockRow (&r)[8]) {
  VecF quarters[2][2][4];  // [upper, lower][left, right]
  unroll<8>([&](auto i) DECO_INLINE_LAMBDA {
    quarters[i / 4][0][i % 4] = r[i].left;
    quarters[i / 4][1][i % 4] = r[i].right;
  });
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA { transpose(quarters[i / 2][i % 2]); });
  unroll<8>([&](auto i) DECO_INLINE_LAMBDA { r[i] = {quarters[0][i / 4][i % 4], quarters[1][i / 4][i % 4]}; });
}

#else

using BlockRow = VecF;
constexpr int kRowPixels = kLanes;

DECO_INLINE BlockRow broadcast_row(float x) { return broadcast(x); }
DECO_INLINE BlockRow load_row(const float* p) { return load(p); }
DECO_INLINE void store_row(float* p, BlockRow x) { store(p, x); }

#if DECO_LANES == 8

DECO_INLINE void transpose_blocks(BlockRow (&r)[8]) { transpose(r); }

#else

// The lower and the upper eight lanes hold one 8x8 block each; each is transposed in place.
DECO_INLINE void transpose_blocks(BlockRow (&r)[8]) {
  VecF t[8];
  const auto as_double = [](VecF x) DECO_INLINE_LAMBDA { return _mm512_castps_pd(x); };
  const auto as_float = [](__m512d x) DECO_INLINE_LAMBDA { return _mm512_castpd_ps(x); };
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {  // 2x2 within 128-bit lanes
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  unroll<2>([&](auto i) DECO_INLINE_LAMBDA {  // 4x4 within 128-bit lanes
    r[4 * i] = as_float(_mm512_unpacklo_pd(as_double(t[4 * i]), as_double(t[4 * i + 2])));
    r[4 * i + 1] = as_float(_mm512_unpackhi_pd(as_double(t[4 * i]), as_double(t[4 * i + 2])));
    r[4 * i + 2] = as_float(_mm512_unpacklo_pd(as_double(t[4 * i + 1]), as_double(t[4 * i + 3])));
    r[4 * i + 3] = as_float(_mm512_unpackhi_pd(as_double(t[4 * i + 1]), as_double(t[4 * i + 3])));
  });
  const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {  // the two 128-bit lanes of each 8x8 block
    const __m512d upper = as_double(r[i]), lower = as_double(r[i + 4]);
    r[i] = as_float(_mm512_permutex2var_pd(upper, even, lower));
    r[i + 4] = as_float(_mm512_permutex2var_pd(upper, odd, lower));
  });
}

#endif
#endif

constexpr int kRowBlocks = kRowPixels / kBlock;

// With c_k = cos(pi k / 16): c3/c1, c5/c1, c7/c1 and c6/c2
constexpr float kRatio3 = 0.84775907f, kRatio5 = 0.56645450f, kRatio7 = 0.19891237f, kRatio6 = 0.41421356f;

// Square of the factor that makes coefficient k of `dct` orthonormal: 1/8 for 0 and 4, c2^2/4 for 2 and 6, c1^2/4 for
// the others.
constexpr float dct_square_norm(int k) { return k % 4 == 0 ? 0.125f : k % 4 == 2 ? 0.21338835f : 0.24048494f; }

// a + cb b and a + cb b + cc c + cd d
DECO_INLINE BlockRow combine(BlockRow a, float cb, BlockRow b) { return fma(b, broadcast_row(cb), a); }
DECO_INLINE BlockRow combine(BlockRow a, float cb, BlockRow b, float cc, BlockRow c, float cd, BlockRow d) {
  return combine(combine(combine(a, cb, b), cc, c), cd, d);
}

// y[k] ~ sum_n cos(pi (2n+1) k / 16) x[n], in place. Even frequencies use sums of mirrored samples, odd ones
// differences; the even half splits the same way again. Coefficients 3, 5, 6 and 7 have the opposite sign.
DECO_INLINE void dct(BlockRow (&x)[8]) {
  const BlockRow s0 = x[0] + x[7], s1 = x[1] + x[6], s2 = x[2] + x[5], s3 = x[3] + x[4];
  const BlockRow d0 = x[0] - x[7], d1 = x[1] - x[6], d2 = x[2] - x[5], d3 = x[3] - x[4];
  const BlockRow e0 = s0 + s3, e1 = s1 + s2, e2 = s1 - s2, e3 = s0 - s3;
  x[0] = e0 + e1;
  x[4] = e0 - e1;
  x[2] = combine(e3, kRatio6, e2);
  x[6] = combine(e2, -kRatio6, e3);
  x[1] = combine(d0, kRatio3, d1, kRatio5, d2, kRatio7, d3);
  x[3] = combine(d2, -kRatio3, d0, kRatio7, d1, kRatio5, d3);
  x[5] = combine(d1, -kRatio5, d0, -kRatio7, d2, -kRatio3, d3);
  x[7] = combine(d3, -kRatio7, d0, kRatio5, d1, -kRatio3, d2);
}

// Transpose of `dct`, in place: x[n] = sum_k dct[k][n] y[k].
DECO_INLINE void dct_transposed(BlockRow (&y)[8]) {
  const BlockRow e0 = y[0] + y[4], e1 = y[0] - y[4];
  const BlockRow e3 = combine(y[2], -kRatio6, y[6]), e2 = combine(y[6], kRatio6, y[2]);
  const BlockRow s0 = e0 + e3, s1 = e1 + e2, s2 = e1 - e2, s3 = e0 - e3;
  const BlockRow d0 = combine(y[1], -kRatio3, y[3], -kRatio5, y[5], -kRatio7, y[7]);
  const BlockRow d1 = combine(y[5], kRatio3, y[1], kRatio7, y[3], kRatio5, y[7]);
  const BlockRow d2 = combine(y[3], kRatio5, y[1], -kRatio7, y[5], -kRatio3, y[7]);
  const BlockRow d3 = combine(y[7], kRatio7, y[1], kRatio5, y[3], -kRatio3, y[5]);
  y[0] = s0 + d0;
  y[7] = s0 - d0;
  y[1] = s1 + d1;
  y[6] = s1 - d1;
  y[2] = s2 + d2;
  y[5] = s2 - d2;
  y[3] = s3 + d3;
  y[4] = s3 - d3;
}

}  // namespace deco::cpu::DECO_CPU_ISA
