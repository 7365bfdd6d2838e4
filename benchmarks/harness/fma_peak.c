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

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* One instruction multiplies 16 x 32 by 32 x 16 values and adds them into 16 x 16 sums; four tiles are independent.
   Returns 0 if the system does not grant the tile registers. */
double fma_bfloat16(long rounds, float* sink) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, TILES = 4, SIDE = 16, SUM = 32 };
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return 0.0;
  /* GCC drops assignments to it: it takes only the first bytes of a configuration for read. */
  static const struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } configuration = {1, 0, {0}, {64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
  static float values[SIDE][SIDE];
  _tile_loadconfig(&configuration);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values, sizeof(values[0]));
  _tile_loadd(5, values, sizeof(values[0]));
  for (long round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
  *sink = values[0][0];
  return 2.0 * SIDE * SIDE * SUM * TILES * (double)rounds;
}
#elif defined(__AVX512BF16__)
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
