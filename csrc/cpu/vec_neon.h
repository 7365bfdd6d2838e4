// VecF for 64-bit Arm with NEON and, with DECO_HAVE_BF16_DOT, the bfloat16 dot product. Included by vec.h.
#pragma once

#include <arm_neon.h>

#define DECO_LANES 4
#define DECO_HAVE_BF16_DOT DECO_CPU_ISA_neonbf16

namespace deco::cpu::DECO_CPU_ISA {

using VecF = float32x4_t;
constexpr int kLanes = DECO_LANES;

DECO_INLINE VecF broadcast(float x) { return vdupq_n_f32(x); }
DECO_INLINE VecF load(const float* p) { return vld1q_f32(p); }
DECO_INLINE void store(float* p, VecF x) { vst1q_f32(p, x); }
DECO_INLINE void store_streaming(float* p, VecF x) { store(p, x); }
DECO_INLINE VecF fma(VecF a, VecF b, VecF c) { return vfmaq_f32(c, a, b); }
DECO_INLINE VecF fnma(VecF a, VecF b, VecF c) { return vfmsq_f32(c, a, b); }
DECO_INLINE float sum(VecF x) { return vaddvq_f32(x); }

DECO_INLINE VecF load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

DECO_INLINE void store_bf16(uint16_t* p, VecF x) {
#if DECO_HAVE_BF16_DOT
  vst1_u16(p, vreinterpret_u16_bf16(vcvt_bf16_f32(x)));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000)), is_number = vceqq_f32(x, x);
  vst1_u16(p, vshrn_n_u32(vbslq_u32(is_number, rounded, quiet), 16));
#endif
}

DECO_INLINE VecF load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
DECO_INLINE void store_f16(uint16_t* p, VecF x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

// x = integer + fraction with |fraction| <= 1/2. Adding 1.5 * 2^23 puts the integer in the low bits of `shifted`.
// min and max return NaN if an operand is NaN.
struct ExponentParts {
  VecF shifted, fraction;
};
DECO_INLINE ExponentParts exp2_parts(VecF x) {
  x = vmaxq_f32(broadcast(-126.0f), vminq_f32(broadcast(126.0f), x));
  const VecF magic = broadcast(12582912.0f), shifted = x + magic;
  return {shifted, x - (shifted - magic)};
}
DECO_INLINE VecF scale_by_exponent(VecF x, ExponentParts parts) {
  const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(parts.shifted), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), exponent));
}

template <Accuracy>
DECO_INLINE VecF reciprocal(VecF x) {
  return broadcast(1.0f) / x;
}
DECO_INLINE VecF rsqrt(VecF x) { return broadcast(1.0f) / vsqrtq_f32(x); }

// r[i] lane j <-> r[j] lane i.
DECO_INLINE void transpose(VecF (&r)[4]) {
  const auto as_double = [](VecF x) DECO_INLINE_LAMBDA { return vreinterpretq_f64_f32(x); };
  const auto as_float = [](float64x2_t x) DECO_INLINE_LAMBDA { return vreinterpretq_f32_f64(x); };
  const VecF t0 = vtrn1q_f32(r[0], r[1]), t1 = vtrn2q_f32(r[0], r[1]);  // 2x2
  const VecF t2 = vtrn1q_f32(r[2], r[3]), t3 = vtrn2q_f32(r[2], r[3]);
  r[0] = as_float(vzip1q_f64(as_double(t0), as_double(t2)));  // the two halves
  r[1] = as_float(vzip1q_f64(as_double(t1), as_double(t3)));
  r[2] = as_float(vzip2q_f64(as_double(t0), as_double(t2)));
  r[3] = as_float(vzip2q_f64(as_double(t1), as_double(t3)));
}

#if DECO_HAVE_BF16_DOT
// A vector of 4 pairs of bfloat16; the first of a pair is in the low half of its 32 bits.
using VecPair = uint32x4_t;

DECO_INLINE VecPair load_pairs(const uint32_t* p) { return vld1q_u32(p); }
DECO_INLINE void store_pairs(uint32_t* p, VecPair x) { vst1q_u32(p, x); }
DECO_INLINE void store_pairs_streaming(uint32_t* p, VecPair x) { store_pairs(p, x); }
DECO_INLINE VecPair broadcast_pair(uint32_t pair) { return vdupq_n_u32(pair); }

// acc + a.first * b.first + a.second * b.second, accumulated in float.
DECO_INLINE VecF dot_pairs(VecF acc, VecPair a, VecPair b) {
  return vbfdotq_f32(acc, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}

// Two adjacent runs of 4 values, rounded to 8 consecutive bfloat16.
DECO_INLINE VecPair join_runs(VecF low, VecF high) {
  return vreinterpretq_u32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}

// Lane i becomes the pair (first[i], second[i]), rounded.
DECO_INLINE VecPair make_pairs(VecF first, VecF second) {
  const uint16x8_t runs = vreinterpretq_u16_u32(join_runs(first, second));
  return vreinterpretq_u32_u16(vzip1q_u16(runs, vextq_u16(runs, runs, 4)));
}
DECO_INLINE VecF first_of_pairs(VecPair x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); }
DECO_INLINE VecF second_of_pairs(VecPair x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))); }

// a and b are runs of 8 bfloat16; lane i of the results is the pair (a[i], b[i]): the first 4, then the last 4.
struct InterleavedRuns {
  VecPair low, high;
};
DECO_INLINE InterleavedRuns interleave_runs(VecPair a, VecPair b) {
  const uint16x8_t first = vreinterpretq_u16_u32(a), second = vreinterpretq_u16_u32(b);
  return {vreinterpretq_u32_u16(vzip1q_u16(first, second)), vreinterpretq_u32_u16(vzip2q_u16(first, second))};
}

DECO_INLINE void transpose_pairs(VecPair (&r)[4]) {
  VecF t[4];
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA { t[i] = vreinterpretq_f32_u32(r[i]); });
  transpose(t);
  unroll<4>([&](auto i) DECO_INLINE_LAMBDA { r[i] = vreinterpretq_u32_f32(t[i]); });
}
#endif

}  // namespace deco::cpu::DECO_CPU_ISA
