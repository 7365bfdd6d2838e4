// VecF for AVX-512 (F, BW, DQ, VL) and, with DECO_HAVE_BF16_DOT, the bfloat16 dot product. Included by vec.h.
#pragma once

#include <immintrin.h>

#define DECO_LANES 16
#define DECO_HAVE_BF16_DOT (DECO_CPU_ISA_avx512bf16 || DECO_CPU_ISA_amx)
#define DECO_HAVE_AMX DECO_CPU_ISA_amx

namespace deco::cpu::DECO_CPU_ISA {

using VecF = __m512;
constexpr int kLanes = DECO_LANES;

DECO_INLINE VecF broadcast(float x) { return _mm512_set1_ps(x); }
DECO_INLINE VecF load(const float* p) { return _mm512_loadu_ps(p); }
DECO_INLINE void store(float* p, VecF x) { _mm512_storeu_ps(p, x); }
DECO_INLINE void store_streaming(float* p, VecF x) { _mm512_stream_ps(p, x); }  // p aligned to 64 bytes
DECO_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
DECO_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm512_fnmadd_ps(a, b, c); }
DECO_INLINE float sum(VecF x) { return _mm512_reduce_add_ps(x); }

DECO_INLINE VecF load_bf16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

DECO_INLINE void store_bf16(uint16_t* p, VecF x) {
#if DECO_HAVE_BF16_DOT
  const __m256i result = (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i result = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), result);
}

DECO_INLINE VecF load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DECO_INLINE void store_f16(uint16_t* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// x = integer + fraction with |fraction| <= 1/2. min returns its second operand if one is NaN, so NaN propagates; the
// fraction of an infinity is 0.
struct ExponentParts {
  VecF integer, fraction;
};
DECO_INLINE ExponentParts exp2_parts(VecF x) {
  x = _mm512_min_ps(broadcast(126.0f), x);
  return {_mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DECO_INLINE VecF scale_by_exponent(VecF x, ExponentParts parts) { return _mm512_scalef_ps(x, parts.integer); }

// 1/x for x in [1, 2^126]: an estimate of 14 bits, refined by one Newton step for Accuracy::kFloat.
template <Accuracy kAccuracy>
DECO_INLINE VecF reciprocal(VecF x) {
  const VecF r = _mm512_rcp14_ps(x);
  if constexpr (kAccuracy == Accuracy::kBFloat16) return r;
  return fma(r, fnma(x, r, broadcast(1.0f)), r);
}

DECO_INLINE VecF rsqrt(VecF x) {
  const VecF r = _mm512_rsqrt14_ps(x);
  const VecF half = x * r * broadcast(0.5f);
  return fma(r, fnma(half, r, broadcast(0.5f)), r);
}

// r[i] lane j <-> r[j] lane i.
DECO_INLINE void transpose(VecF (&r)[16]) {
  VecF t[16];
  const auto as_double = [](VecF x) DECO_INLINE_LAMBDA { return _mm512_castps_pd(x); };
  const auto as_float = [](__m512d x) DECO_INLINE_LAMBDA { return _mm512_castpd_ps(x); };
  unroll<8>([&](auto i) DECO_INLINE_LAMBDA {  // 2x2 within 128-bit lanes
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {  // 4x4 within 128-bit lanes
    r[4 * i] = as_float(_mm512_unpacklo_pd(as_double(t[4 * i]), as_double(t[4 * i + 2])));
    r[4 * i + 1] = as_float(_mm512_unpackhi_pd(as_double(t[4 * i]), as_double(t[4 * i + 2])));
    r[4 * i + 2] = as_float(_mm512_unpacklo_pd(as_double(t[4 * i + 1]), as_double(t[4 * i + 3])));
    r[4 * i + 3] = as_float(_mm512_unpackhi_pd(as_double(t[4 * i + 1]), as_double(t[4 * i + 3])));
  });
  constexpr int kEven = 0x88, kOdd = 0xdd;
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {  // the 128-bit lanes, in two rounds
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], kEven);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], kOdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], kEven);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], kOdd);
  });
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], kEven);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], kEven);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], kOdd);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], kOdd);
  });
}

#if DECO_HAVE_BF16_DOT
// A vector of 16 pairs of bfloat16; the first of a pair is in the low half of its 32 bits.
using VecPair = __m512i;

DECO_INLINE VecPair load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
DECO_INLINE void store_pairs(uint32_t* p, VecPair x) { _mm512_storeu_si512(p, x); }
DECO_INLINE void store_pairs_streaming(uint32_t* p, VecPair x) {  // p aligned to 64 bytes
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
}
DECO_INLINE VecPair broadcast_pair(uint32_t pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }

// acc + a.first * b.first + a.second * b.second, accumulated in float.
DECO_INLINE VecF dot_pairs(VecF acc, VecPair a, VecPair b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// Two adjacent runs of 16 values, rounded to 32 consecutive bfloat16.
DECO_INLINE VecPair join_runs(VecF low, VecF high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Lane i becomes the pair (first[i], second[i]), rounded.
DECO_INLINE VecPair make_pairs(VecF first, VecF second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, join_runs(first, second));
}
DECO_INLINE VecF first_of_pairs(VecPair x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
DECO_INLINE VecF second_of_pairs(VecPair x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// a and b are runs of 32 bfloat16; lane i of the results is the pair (a[i], b[i]): the first 16, then the last 16.
struct InterleavedRuns {
  VecPair low, high;
};
DECO_INLINE InterleavedRuns interleave_runs(VecPair a, VecPair b) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                        53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return {_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)};
}

DECO_INLINE void transpose_pairs(VecPair (&r)[16]) {
  VecF t[16];
  unroll<16>([&](auto i) DECO_INLINE_LAMBDA { t[i] = _mm512_castsi512_ps(r[i]); });
  transpose(t);
  unroll<16>([&](auto i) DECO_INLINE_LAMBDA { r[i] = _mm512_castps_si512(t[i]); });
}
#endif

}  // namespace deco::cpu::DECO_CPU_ISA
