/* Peak rate of multiply-adds of one core: twelve independent chains of vector accumulators that stay in registers.
   Each function returns the FLOPs done in `rounds` rounds; `sink` receives a value, so that nothing is optimized away. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { CHAINS = 12 };

typedef float Vector __attribute__((vector_size(4 * LANES)));

#define EACH(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)

double fma_float32(long rounds, float* sink) {
#define DECLARE(i) Vector a##i = {(float)i + 1.0f};
  EACH(DECLARE)
#undef DECLARE
  Vector factor = a0 * 0.0f + 0.999f, term = a0 * 0.0f + 1e-3f;
  for (long round = 0; round < rounds; ++round) {
#define STEP(i) a##i = a##i * factor + term;
    EACH(STEP)
#undef STEP
    __asm__ volatile("" ::: "memory");
  }
#define ADD(i) +a##i
  Vector sum = term EACH(ADD);
#undef ADD
  *sink = sum[0];
  return 2.0 * LANES * CHAINS * (double)rounds;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

/* One instruction multiplies 32 pairs and adds them into 16 sums. */
double fma_bfloat16(long rounds, float* sink) {
#define DECLARE(i) __m512 a##i = _mm512_set1_ps((float)i);
  EACH(DECLARE)
#undef DECLARE
  __m512bh left = (__m512bh)_mm512_set1_epi16(0x3c00), right = (__m512bh)_mm512_set1_epi16(0x3c01);
  for (long round = 0; round < rounds; ++round) {
#define STEP(i) a##i = _mm512_dpbf16_ps(a##i, left, right);
    EACH(STEP)
#undef STEP
    __asm__ volatile("" ::: "memory");
  }
#define ADD(i) +a##i
  __m512 sum = _mm512_setzero_ps() EACH(ADD);
#undef ADD
  *sink = sum[0];
  return 2.0 * 2.0 * LANES * CHAINS * (double)rounds;
}
#endif
