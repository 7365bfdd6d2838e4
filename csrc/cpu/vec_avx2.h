// VecF for AVX2 with FMA and F16C. Included by vec.h.
#pragma once

#include <immintrin.h>

#define DECO_LANES 8
#define DECO_HAVE_BF16_DOT 0

namespace deco::cpu::DECO_CPU_ISA {

using VecF = __m256;
constexpr int kLanes = DECO_LANES;

DECO_INLINE VecF broadcast(float x) { return _mm256_set1_ps(x); }
DECO_INLINE VecF load(const float* p) { return _mm256_loadu_ps(p); }
DECO_INLINE void store(float* p, VecF x) { _mm256_storeu_ps(p, x); }
DECO_INLINE void store_streaming(float* p, VecF x) { _mm256_stream_ps(p, x); }  // p aligned to 32 bytes
DECO_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
DECO_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm256_fnmadd_ps(a, b, c); }

DECO_INLINE float sum(VecF x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

DECO_INLINE VecF load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

DECO_INLINE void store_bf16(uint16_t* p, VecF x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

DECO_INLINE VecF load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DECO_INLINE void store_f16(uint16_t* p, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// x = integer + fraction with |fraction| <= 1/2. Adding 1.5 * 2^23 puts the integer in the low bits of `shifted`.
// min and max return their second operand if one is NaN, so NaN propagates.
struct ExponentParts {
  VecF shifted, fraction;
};
DECO_INLINE ExponentParts exp2_parts(VecF x) {
  x = _mm256_max_ps(broadcast(-126.0f), _mm256_min_ps(broadcast(126.0f), x));
  const VecF magic = broadcast(12582912.0f), shifted = x + magic;
  return {shifted, x - (shifted - magic)};
}
DECO_INLINE VecF scale_by_exponent(VecF x, ExponentParts parts) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(parts.shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}

template <Accuracy>
DECO_INLINE VecF reciprocal(VecF x) {
  return broadcast(1.0f) / x;
}
DECO_INLINE VecF rsqrt(VecF x) { return broadcast(1.0f) / _mm256_sqrt_ps(x); }

// r[i] lane j <-> r[j] lane i.
DECO_INLINE void transpose(VecF (&r)[8]) {
  VecF t[8];
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {  // 2x2 within 128-bit lanes
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  unroll<2>([&](auto i) DECO_INLINE_LAMBDA {  // 4x4 within 128-bit lanes
    constexpr int kLow = 0x44, kHigh = 0xee;
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], kLow);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], kHigh);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], kLow);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], kHigh);
  });
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA {  // the two 128-bit lanes
    const VecF low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
