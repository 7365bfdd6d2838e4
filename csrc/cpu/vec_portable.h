// VecF in C++ with the vector extension of GCC and clang: four floats on any processor. Included by vec.h.
#pragma once

#include <cmath>

#define DECO_LANES 4
#define DECO_HAVE_BF16_DOT 0

namespace deco::cpu::DECO_CPU_ISA {

typedef float VecF __attribute__((vector_size(16)));
typedef int32_t VecI __attribute__((vector_size(16)));
constexpr int kLanes = DECO_LANES;

DECO_INLINE VecF broadcast(float x) { return VecF{x, x, x, x}; }
DECO_INLINE VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
DECO_INLINE void store(float* p, VecF x) { std::memcpy(p, &x, sizeof(x)); }
DECO_INLINE void store_streaming(float* p, VecF x) { store(p, x); }
DECO_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
DECO_INLINE VecF fnma(VecF a, VecF b, VecF c) { return c - a * b; }
DECO_INLINE float sum(VecF x) { return (x[0] + x[2]) + (x[1] + x[3]); }

DECO_INLINE VecF load_bf16(const uint16_t* p) {
  return VecF{float_from_bf16(p[0]), float_from_bf16(p[1]), float_from_bf16(p[2]), float_from_bf16(p[3])};
}
DECO_INLINE void store_bf16(uint16_t* p, VecF x) {
  for (int i = 0; i < kLanes; ++i) p[i] = bf16_from_float(x[i]);
}
DECO_INLINE VecF load_f16(const uint16_t* p) {
  return VecF{float_from_f16(p[0]), float_from_f16(p[1]), float_from_f16(p[2]), float_from_f16(p[3])};
}
DECO_INLINE void store_f16(uint16_t* p, VecF x) {
  for (int i = 0; i < kLanes; ++i) p[i] = f16_from_float(x[i]);
}

// x = integer + fraction with |fraction| <= 1/2. Adding 1.5 * 2^23 puts the integer in the low bits of `shifted`.
// The comparisons are false for NaN, so NaN propagates.
struct ExponentParts {
  VecF shifted, fraction;
};
DECO_INLINE ExponentParts exp2_parts(VecF x) {
  const VecF low = broadcast(-126.0f), high = broadcast(126.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const VecF magic = broadcast(12582912.0f), shifted = x + magic;
  return {shifted, x - (shifted - magic)};
}
DECO_INLINE VecF scale_by_exponent(VecF x, ExponentParts parts) {
  return (VecF)((VecI)x + ((VecI)parts.shifted << 23));
}

template <Accuracy>
DECO_INLINE VecF reciprocal(VecF x) {
  return broadcast(1.0f) / x;
}
DECO_INLINE VecF rsqrt(VecF x) {
  return VecF{1.0f / std::sqrt(x[0]), 1.0f / std::sqrt(x[1]), 1.0f / std::sqrt(x[2]), 1.0f / std::sqrt(x[3])};
}

// r[i] lane j <-> r[j] lane i.
DECO_INLINE void transpose(VecF (&r)[4]) {
  const VecF a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = VecF{a[0], b[0], c[0], d[0]};
  r[1] = VecF{a[1], b[1], c[1], d[1]};
  r[2] = VecF{a[2], b[2], c[2], d[2]};
  r[3] = VecF{a[3], b[3], c[3], d[3]};
}

}  // namespace deco::cpu::DECO_CPU_ISA
