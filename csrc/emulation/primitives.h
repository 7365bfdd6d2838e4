// Host implementation of cuda/primitives.h on emulation/machine.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#if !defined(__F16C__)
#error "compile the emulator with -mf16c (or -march=native)"
#endif
#include <immintrin.h>

#include "emulation/machine.h"

#define DECO_DEVICE inline __attribute__((always_inline))
#define DECO_HOST_DEVICE inline
#define DECO_KERNEL(threads, blocks, name, parameters) \
  inline void name(parameters, deco::emulation::LaunchBounds<(threads)>)

namespace deco::cuda {

namespace emulated {

using emulation::Exchange;
using emulation::kLanes;
using emulation::Machine;
using emulation::Operation;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int64_t bits_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}
inline double double_of(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) { return _cvtsh_ss(value.bits); }

template <class T>
uint16_t round_to(float value);
template <>
inline uint16_t round_to<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <>
inline uint16_t round_to<Float16>(float value) {
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

// The nearest float that is not larger in magnitude.
inline float toward_zero(double value) {
  const auto nearest = static_cast<float>(value);
  return std::abs(nearest) > std::abs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// 8x8 elements from one word of each lane, in the layout of cuda/primitives.h.
inline void gather_matrix(uint16_t (&matrix)[8][8], const Exchange& exchange, int word) {
  for (int lane = 0; lane < kLanes; ++lane) {
    matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(exchange.in[lane][word]);
    matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(exchange.in[lane][word] >> 16);
  }
}
inline void scatter_matrix(Exchange& exchange, int word, const uint16_t (&matrix)[8][8], bool transposed) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    const uint32_t first = transposed ? matrix[t][g] : matrix[g][t];
    const uint32_t second = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
    exchange.out[lane][word] = first | second << 16;
  }
}

inline void bring_address(uint32_t* in, const void* address) { std::memcpy(in, &address, sizeof(address)); }
inline char* address_of(const Exchange& exchange, int lane) {
  char* address;
  std::memcpy(&address, exchange.in[lane], sizeof(address));
  return address;
}

// sum[n] += Σ a[k]·b[k][n] over eight k, as tensor cores add: all nine terms are aligned to the largest exponent, cut to
// 24 bits toward zero, and added; the total is cut likewise. (M. Fasi et al., "Numerical behavior of NVIDIA tensor
// cores", 2021; without the extra bits that some architectures keep.)
inline void add_products_truncating(float (&sum)[8], const float* a, const float (*b)[8]) {
  constexpr int64_t kExponentOne = 1023, kMantissaBits = 52, kKeptBits = 23;
  for (int n = 0; n < 8; ++n) {
    double terms[9] = {sum[n]}, largest = std::abs(terms[0]), plain = terms[0], total = 0;
    for (int k = 0; k < 8; ++k) {
      terms[k + 1] = static_cast<double>(a[k]) * b[k][n];
      largest = std::max(largest, std::abs(terms[k + 1]));
      plain += terms[k + 1];
    }
    if (largest == 0 || !std::isfinite(plain)) {
      sum[n] = static_cast<float>(plain);
      continue;
    }
    const int64_t exponent = (bits_of(largest) >> kMantissaBits) - kExponentOne - kKeptBits;
    const double unit = double_of((kExponentOne + exponent) << kMantissaBits);
    const double inverse = double_of((kExponentOne - exponent) << kMantissaBits);
    for (const double term : terms) total += std::trunc(term * inverse);
    sum[n] = toward_zero(total * unit);
  }
}

// d = a·b + c with K = 8·KTiles: in = a (2·KTiles words), b (KTiles words), c (4 words).
template <class T, int KTiles>
void multiply_tiles(Exchange& exchange) {
  float a[16][8 * KTiles], b[8 * KTiles][8];
  for (int tile = 0; tile < 2 * KTiles; ++tile) {
    uint16_t matrix[8][8];
    gather_matrix(matrix, exchange, tile);
    for (int i = 0; i < 8; ++i)
      for (int k = 0; k < 8; ++k) a[i + 8 * (tile % 2)][k + 8 * (tile / 2)] = widen(T{matrix[i][k]});
  }
  for (int tile = 0; tile < KTiles; ++tile) {
    uint16_t matrix[8][8];
    gather_matrix(matrix, exchange, 2 * KTiles + tile);
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 8; ++k) b[k + 8 * tile][n] = widen(T{matrix[n][k]});
  }
  const bool truncating = Machine::instance().truncating();
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    const auto lane_of = [&](int n) { return 4 * (row % 8) + n / 2; };
    for (int n = 0; n < 8; ++n) sum[n] = float_of(exchange.in[lane_of(n)][3 * KTiles + 2 * (row / 8) + n % 2]);
    if (truncating) {
      for (int k = 0; k < 8 * KTiles; k += 8) add_products_truncating(sum, a[row] + k, b + k);
    } else {
      for (int k = 0; k < 8 * KTiles; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) exchange.out[lane_of(n)][2 * (row / 8) + n % 2] = bits_of(sum[n]);
  }
}

template <bool Transposed>
void load_matrices(uint32_t (&words)[4], const void* row) {
  Machine& machine = Machine::instance();
  machine.check_shared(row, 16, 16);
  bring_address(machine.arrive(Transposed ? Operation::kLoadMatricesTransposed : Operation::kLoadMatrices), row);
  const uint32_t* out = machine.meet([&machine](Exchange& exchange) {
    machine.access_matrices([&](int i) { return address_of(exchange, i); }, false);
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], address_of(exchange, 8 * m + i), 16);
      scatter_matrix(exchange, m, matrix, Transposed);
    }
  });
  std::memcpy(words, out, sizeof(words));
}

}  // namespace emulated

using std::min;

inline void wait_for_previous_kernel() { emulated::Machine::instance().wait_for_previous_kernel(); }

DECO_DEVICE int thread() { return emulated::Machine::instance().thread(); }
DECO_DEVICE int lane() { return thread() % emulated::kLanes; }
DECO_DEVICE int warp() { return thread() / emulated::kLanes; }
struct UniformWarp {
  operator int() const { return warp(); }
};
DECO_DEVICE int block() { return emulated::Machine::instance().block(); }
DECO_DEVICE int block_count() { return emulated::Machine::instance().size().blocks; }
DECO_DEVICE int block_threads() { return emulated::Machine::instance().size().threads; }

DECO_DEVICE char* shared_memory() { return emulated::Machine::instance().shared_memory(); }

template <class V>
DECO_DEVICE V load(const V* address) {
  emulated::Machine::instance().access(address, sizeof(V), alignof(V), false);
  return *address;
}
template <class V>
DECO_DEVICE void store(V* address, V value) {
  emulated::Machine::instance().access(address, sizeof(V), alignof(V), true);
  *address = value;
}

template <class V>
DECO_DEVICE void store_global(V* address, V value) {
  store(address, value);
}

template <class V>
DECO_DEVICE void copy_async(V* shared, const V* global) {
  emulated::Machine& machine = emulated::Machine::instance();
  machine.access(global, sizeof(V), alignof(V), false);
  machine.access(shared, sizeof(V), alignof(V), true);
  machine.start_copy(shared, global, sizeof(V));
}
inline void commit_copies() { emulated::Machine::instance().commit_copies(); }
template <int Groups>
void wait_for_copies() {
  emulated::Machine::instance().wait_for_copies(Groups);
}

DECO_DEVICE void block_barrier() { emulated::Machine::instance().block_barrier(); }
inline void warp_barrier() {
  emulated::Machine& machine = emulated::Machine::instance();
  machine.arrive(emulated::Operation::kWarpBarrier);
  machine.meet([](emulated::Exchange&) {});
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  emulated::Machine& machine = emulated::Machine::instance();
  machine.arrive(emulated::Operation::kShuffle)[0] = value;
  return machine.meet([mask](emulated::Exchange& exchange) {
    for (int lane = 0; lane < emulated::kLanes; ++lane) exchange.out[lane][0] = exchange.in[lane ^ mask][0];
  })[0];
}
inline float shuffle_xor(float value, int mask) {
  return emulated::float_of(shuffle_xor(emulated::bits_of(value), mask));
}

template <class V>
V held(V value) {
  return value;
}

// The exact value rounded to 11 significant bits, or cut to 12: an error as large as that of the hardware.
inline float tanh_approximate(float x) {
  if (std::isnan(x)) return x;
  const uint32_t exact = emulated::bits_of(std::tanh(x));
  return emulated::float_of(emulated::Machine::instance().truncating() ? exact & ~0xfffu : (exact + 0x1000) & ~0x1fffu);
}
inline float rsqrt_approximate(float x) { return 1.0f / std::sqrt(x); }

template <class T>
DECO_DEVICE uint32_t pack(float low, float high) {
  return emulated::round_to<T>(low) | static_cast<uint32_t>(emulated::round_to<T>(high)) << 16;
}
DECO_DEVICE float float_of_bits(uint32_t word) { return emulated::float_of(word); }
template <class T>
DECO_DEVICE float low(uint32_t word) {
  return emulated::widen(T{static_cast<uint16_t>(word)});
}
template <class T>
DECO_DEVICE float high(uint32_t word) {
  return emulated::widen(T{static_cast<uint16_t>(word >> 16)});
}

template <class T>
DECO_DEVICE float half_of_low(uint32_t word) {
  return 0.5f * low<T>(word);
}
template <class T>
DECO_DEVICE float half_of_high(uint32_t word) {
  return 0.5f * high<T>(word);
}

inline void load_matrices(uint32_t (&words)[4], const void* row) { emulated::load_matrices<false>(words, row); }
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  emulated::load_matrices<true>(words, row);
}
inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  emulated::Machine& machine = emulated::Machine::instance();
  machine.check_shared(row, 16, 16);
  uint32_t* in = machine.arrive(emulated::Operation::kStoreMatrices);
  emulated::bring_address(in, row);
  std::memcpy(in + 2, words, sizeof(words));
  machine.meet([&machine](emulated::Exchange& exchange) {
    machine.access_matrices([&](int i) { return emulated::address_of(exchange, i); }, true);
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      emulated::gather_matrix(matrix, exchange, 2 + m);
      for (int i = 0; i < 8; ++i) std::memcpy(emulated::address_of(exchange, 8 * m + i), matrix[i], 16);
    }
  });
}
inline uint32_t transpose(uint32_t word) {
  emulated::Machine& machine = emulated::Machine::instance();
  machine.arrive(emulated::Operation::kTranspose)[0] = word;
  return machine.meet([](emulated::Exchange& exchange) {
    uint16_t matrix[8][8];
    emulated::gather_matrix(matrix, exchange, 0);
    emulated::scatter_matrix(exchange, 0, matrix, true);
  })[0];
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  emulated::Machine& machine = emulated::Machine::instance();
  uint32_t* in = machine.arrive(emulated::Operation::kMultiply16);
  std::memcpy(in, a, sizeof(a));
  std::memcpy(in + 4, b, sizeof(b));
  std::memcpy(in + 6, c, sizeof(c));
  std::memcpy(d, machine.meet([](emulated::Exchange& e) { emulated::multiply_tiles<T, 2>(e); }), sizeof(d));
}
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
  emulated::Machine& machine = emulated::Machine::instance();
  uint32_t* in = machine.arrive(emulated::Operation::kMultiply8);
  std::memcpy(in, a, sizeof(a));
  in[2] = b;
  std::memcpy(in + 3, c, sizeof(c));
  std::memcpy(d, machine.meet([](emulated::Exchange& e) { emulated::multiply_tiles<T, 1>(e); }), sizeof(d));
}

}  // namespace deco::cuda
