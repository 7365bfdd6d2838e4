// Float vector type, implemented once per instruction set. VecF holds kLanes floats and supports + - * / and the
// functions below. All code is in the namespace of its instruction set: the linker keeps one definition of an inline
// function, so a function shared by two sets could contain instructions of the wrong one. For the same reason kernels
// use no function templates of the standard library.
//
//   broadcast load store            floats, no alignment needed
//   store_streaming                 bypasses the caches; aligned memory
//   load_as store_as                from and to float32, bfloat16 or float16 memory (round to nearest even)
//   fma(a, b, c) = a*b + c          fnma(a, b, c) = c - a*b
//   exp2_parts, reciprocal, rsqrt   parts of sigmoid and LayerNorm; exp2_parts propagates NaN
//   sigmoid<Accuracy>               relative error 3e-7 (kFloat) or 1e-4 (kBFloat16)
//   transpose                       kLanes x kLanes floats in kLanes vectors
//   sum                             over the lanes, in a fixed order
//   dot_pairs and VecPair           dot products of bfloat16 pairs, only if DECO_HAVE_BF16_DOT
//
// Macros: DECO_LANES = kLanes; DECO_HAVE_BF16_DOT is 1 if the instruction set has dot_pairs, DECO_HAVE_AMX is 1 if it has
// tile registers (amx.h), otherwise both are 0 in #if.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "deco/array.h"

#define DECO_INLINE inline __attribute__((always_inline))
#define DECO_INLINE_LAMBDA __attribute__((always_inline))

namespace deco::cpu::DECO_CPU_ISA {

// Calls body(integral_constant<int, i>) for i = 0 .. N-1, unrolled by templates, so that arrays of vectors indexed by i
// stay in registers.
template <class Body, int... I>
DECO_INLINE void unroll_sequence(Body&& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
DECO_INLINE void unroll(Body&& body) {
  unroll_sequence(body, std::make_integer_sequence<int, N>{});
}

enum class Accuracy { kFloat, kBFloat16 };

// ---- scalar conversions -------------------------------------------------------------------------------------------

template <class To, class From>
DECO_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

DECO_INLINE float float_from_bf16(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }

DECO_INLINE uint16_t bf16_from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

DECO_INLINE float float_from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  // The exponent biases differ by 112; multiplication by 2^112 also normalizes subnormal numbers.
  float value = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  if (magnitude >= 0x7c00u) value = bit_cast<float>(magnitude << 13 | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

DECO_INLINE uint16_t f16_from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 puts the value in units of 2^-24 in the low bits, rounded to nearest even.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

DECO_INLINE float load_scalar(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? float_from_bf16(bits) : float_from_f16(bits);
}

DECO_INLINE void store_scalar(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = dtype == DType::kBFloat16 ? bf16_from_float(value) : f16_from_float(value);
  }
}

// `value` rounded to `dtype`.
DECO_INLINE float round_to(DType dtype, float value) {
  if (dtype == DType::kBFloat16) return float_from_bf16(bf16_from_float(value));
  if (dtype == DType::kFloat16) return float_from_f16(f16_from_float(value));
  return value;
}

}  // namespace deco::cpu::DECO_CPU_ISA

#if DECO_CPU_ISA_avx512 || DECO_CPU_ISA_avx512bf16 || DECO_CPU_ISA_amx
#include "cpu/vec_avx512.h"
#elif DECO_CPU_ISA_avx2
#include "cpu/vec_avx2.h"
#elif DECO_CPU_ISA_neon || DECO_CPU_ISA_neonbf16
#include "cpu/vec_neon.h"
#else
#include "cpu/vec_portable.h"
#endif

namespace deco::cpu::DECO_CPU_ISA {

template <DType kDType>
DECO_INLINE VecF load_as(const void* data, int64_t index) {
  if constexpr (kDType == DType::kFloat32) return load(static_cast<const float*>(data) + index);
  if constexpr (kDType == DType::kBFloat16) return load_bf16(static_cast<const uint16_t*>(data) + index);
  if constexpr (kDType == DType::kFloat16) return load_f16(static_cast<const uint16_t*>(data) + index);
}

template <DType kDType>
DECO_INLINE void store_as(void* data, int64_t index, VecF value) {
  if constexpr (kDType == DType::kFloat32) store(static_cast<float*>(data) + index, value);
  if constexpr (kDType == DType::kBFloat16) store_bf16(static_cast<uint16_t*>(data) + index, value);
  if constexpr (kDType == DType::kFloat16) store_f16(static_cast<uint16_t*>(data) + index, value);
}

// Calls body(integral_constant<DType, dtype>): compiles a loop over memory once per storage dtype.
template <class Body>
DECO_INLINE void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kBFloat16: return body(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16: return body(std::integral_constant<DType, DType::kFloat16>{});
  }
}

// Outputs of at least this size are written with streaming stores: they do not fit in the caches until they are read,
// and lines that are overwritten completely need not be read first.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;

// Adds a vector to memory.
DECO_INLINE void accumulate(float* data, VecF value) { store(data, load(data) + value); }

// 2^f for f in [-1/2, 1/2]: least-squares fits of degree 5 (relative error 8e-8) and 3 (8e-5).
template <Accuracy kAccuracy>
DECO_INLINE VecF exp2_fraction(VecF f) {
  const auto horner = [f](VecF sum, float coefficient)
                          DECO_INLINE_LAMBDA { return fma(sum, f, broadcast(coefficient)); };
  if constexpr (kAccuracy == Accuracy::kFloat) {
    VecF sum = horner(broadcast(0.0013276472f), 0.00967554148f);
    sum = horner(sum, 0.0555071327f);
    sum = horner(sum, 0.240221197f);
    sum = horner(sum, 0.693146967f);
    return horner(sum, 1.00000007f);
  } else {
    VecF sum = horner(broadcast(0.0551716694f), 0.242611131f);
    sum = horner(sum, 0.693260986f);
    return horner(sum, 0.999928073f);
  }
}

// 1 / (1 + 2^(-x log2 e)). exp2_parts clamps the exponent, so that nothing overflows.
template <Accuracy kAccuracy>
DECO_INLINE VecF sigmoid(VecF x) {
  const ExponentParts t = exp2_parts(x * broadcast(-1.44269504f));
  const VecF power = scale_by_exponent(exp2_fraction<kAccuracy>(t.fraction), t);
  return reciprocal<kAccuracy>(power + broadcast(1.0f));
}

// The derivative s + x s (1 - s) of SiLU(x) = x s with s = sigmoid(x).
DECO_INLINE VecF silu_derivative(VecF silu_x, VecF sigmoid_x) {
  return fma(silu_x, broadcast(1.0f) - sigmoid_x, sigmoid_x);
}

}  // namespace deco::cpu::DECO_CPU_ISA
