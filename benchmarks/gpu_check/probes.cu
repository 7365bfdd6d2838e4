// Cycles per scheduler of single instructions: each kernel issues one kind of instruction from one thread block, with
// enough independent ones in flight that its pipe never waits. Two kernels issue a mix of two kinds, which shows whether
// their pipes work at the same time. Prints one JSON line per probe.
//
//     cycles = 4 * elapsed / (warp instructions, or mixes),  4 schedulers per multiprocessor
//
// A wgmma counts once for each of its four warps. The loop adds three issue slots to 64 instructions.

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace {

constexpr int kThreads = 512;       // four warps per scheduler
constexpr int kWgmmaThreads = 256;  // two warpgroups, so that the sums fit in registers
constexpr int kIterations = 128;
constexpr int kIndependent = 4;  // chains per warp
constexpr int kUnrolled = 16;    // instructions of a chain per iteration
constexpr int kPerIteration = kIndependent * kUnrolled;
constexpr int kSharedBytes = 16 << 10;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DECO_HAS_WGMMA 1
#endif

struct Mma {
  static constexpr const char* kName = "mma.sync m16n8k16";
  float sum[4];

  __device__ void start(uint32_t seed) {
    for (float& value : sum) value = static_cast<float>(seed);
  }
  __device__ void run(uint32_t a, const void*) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a));
  }
  __device__ float result() const { return sum[0] + sum[1] + sum[2] + sum[3]; }
};

struct Tanh {
  static constexpr const char* kName = "tanh";
  float value;

  __device__ void start(uint32_t seed) { value = static_cast<float>(seed); }
  __device__ void run(uint32_t, const void*) { asm volatile("tanh.approx.f32 %0, %0;" : "+f"(value)); }
  __device__ float result() const { return value; }
};

struct Ldmatrix {
  static constexpr const char* kName = "ldmatrix.x4";
  uint32_t offset;  // zero after the first load, since shared memory holds zeros; every load depends on the one before

  __device__ void start(uint32_t seed) { offset = 16 * (seed % 32); }
  __device__ void run(uint32_t, const void* shared) {
    const uint32_t row = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + (threadIdx.x & 31) * 16;
    uint32_t r[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row + offset));
    offset = r[0];
  }
  __device__ float result() const { return __uint_as_float(offset); }
};

struct Shuffle {
  static constexpr const char* kName = "shuffle";
  uint32_t value;

  __device__ void start(uint32_t seed) { value = seed; }
  __device__ void run(uint32_t a, const void*) {
    asm volatile("shfl.sync.bfly.b32 %0, %0, %1, 0x1f, 0xffffffff;" : "+r"(value) : "r"(a));
  }
  __device__ float result() const { return __uint_as_float(value); }
};

struct Ffma {
  static constexpr const char* kName = "FFMA";
  float value;

  __device__ void start(uint32_t seed) { value = static_cast<float>(seed); }
  __device__ void run(uint32_t a, const void*) {
    asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(value) : "f"(__uint_as_float(a)));
  }
  __device__ float result() const { return value; }
};

// Some of one instruction, then some of another.
template <class First, int Firsts, class Second, int Seconds>
struct Mix {
  First first[Firsts];
  Second second[Seconds];

  __device__ void start(uint32_t seed) {
    for (int i = 0; i < Firsts; ++i) first[i].start(seed + i);
    for (int i = 0; i < Seconds; ++i) second[i].start(seed + i);
  }
  __device__ void run(uint32_t a, const void* shared) {
    for (First& instruction : first) instruction.run(a, shared);
    for (Second& instruction : second) instruction.run(a, shared);
  }
  __device__ float result() const {
    float total = 0.0f;
    for (const First& instruction : first) total += instruction.result();
    for (const Second& instruction : second) total += instruction.result();
    return total;
  }
};

struct LdmatrixAndMma : Mix<Ldmatrix, 1, Mma, 2> {
  static constexpr const char* kName = "ldmatrix.x4 and two mma.sync";
};

struct MmaAndFfma : Mix<Mma, 1, Ffma, 4> {
  static constexpr const char* kName = "mma.sync and four FFMA";
};

struct Interval {
  long long begin, end;
};

template <class Instruction>
__global__ void __launch_bounds__(kThreads, 1) probe(uint32_t a, Interval* intervals, float* results) {
  __shared__ __align__(128) unsigned char shared[kSharedBytes];
  for (int i = threadIdx.x; i < kSharedBytes; i += kThreads) shared[i] = 0;
  // Chains that start alike would be merged, and a value that all lanes share would not be shuffled.
  Instruction chains[kIndependent];
  for (int chain = 0; chain < kIndependent; ++chain) chains[chain].start(threadIdx.x + chain * kThreads);
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < kIterations; ++iteration) {
#pragma unroll
    for (int step = 0; step < kPerIteration; ++step) chains[step % kIndependent].run(a, shared);
  }
  float sum = 0.0f;
  for (const Instruction& chain : chains) sum += chain.result();
  const long long end = clock64();
  results[threadIdx.x] = sum;
  if (threadIdx.x % 32 == 0) intervals[threadIdx.x / 32] = {begin, end};
}

// wgmma m64nNk16, A in registers, B a K-major tile of zeros without swizzle. One warpgroup per 4 warps.
template <int N>
struct Wgmma;

#define DECO_WGMMA(N, REGISTERS, A, DESCRIPTOR, ...)                                                                \
  template <>                                                                                                       \
  struct Wgmma<N> {                                                                                                 \
    static constexpr const char* kName = "wgmma m64n" #N "k16";                                                     \
    float sum[N / 2] = {};                                                                                          \
    __device__ void run(const uint32_t (&a)[4], uint64_t b) {                                                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {" A "}, " DESCRIPTOR \
                   ", 1, 1, 1, 0;"                                                                                  \
                   : __VA_ARGS__                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
    }                                                                                                               \
  };
#define DECO_SUM8(i)                                                                                      \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define DECO_FIRST16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define DECO_NEXT32                                                                                       \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40," \
  "%41,%42,%43,%44,%45,%46,%47"

DECO_WGMMA(32, DECO_FIRST16, "%16,%17,%18,%19", "%20", DECO_SUM8(0), DECO_SUM8(8))
DECO_WGMMA(96, DECO_FIRST16 DECO_NEXT32, "%48,%49,%50,%51", "%52", DECO_SUM8(0), DECO_SUM8(8), DECO_SUM8(16),
           DECO_SUM8(24), DECO_SUM8(32), DECO_SUM8(40))

template <int N>
__global__ void __launch_bounds__(kWgmmaThreads) wgmma_probe(uint32_t a, Interval* intervals, float* results) {
#ifdef DECO_HAS_WGMMA
  __shared__ __align__(128) unsigned char shared[kSharedBytes];
  for (int i = threadIdx.x; i < kSharedBytes; i += kWgmmaThreads) shared[i] = 0;
  asm volatile("fence.proxy.async;");
  __syncthreads();
  // Core matrices of 8 rows x 16 bytes: the next along K lies 128 bytes on, the next along N 256.
  const uint64_t address = static_cast<uint64_t>(__cvta_generic_to_shared(shared));
  const uint64_t descriptor = (address >> 4) | (128ull >> 4) << 16 | (256ull >> 4) << 32;
  const uint32_t fragment[4] = {a, a + threadIdx.x, a + 2 * threadIdx.x, a + 3 * threadIdx.x};
  Wgmma<N> chain;
  const long long begin = clock64();
#pragma unroll 1
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    asm volatile("wgmma.fence.sync.aligned;");
#pragma unroll
    for (int step = 0; step < kPerIteration; ++step) chain.run(fragment, descriptor);
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");  // meanwhile the other warpgroup keeps the pipe busy
  }
  float sum = 0.0f;
  for (float value : chain.sum) sum += value;
  const long long end = clock64();
  results[threadIdx.x] = sum;
  if (threadIdx.x % 32 == 0) intervals[threadIdx.x / 32] = {begin, end};
#endif
}

using Probe = void (*)(uint32_t, Interval*, float*);

int measure(const char* name, Probe kernel, int threads) {
  const int warps = threads / 32;
  Interval* intervals;
  float* results;
  cudaMallocManaged(&intervals, warps * sizeof(Interval));
  cudaMallocManaged(&results, threads * sizeof(float));
  long long fastest = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {  // the first call loads the code
    kernel<<<1, threads>>>(0u, intervals, results);
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
      std::printf("{\"probe\": \"%s\", \"failed\": \"%s\"}\n", name, cudaGetErrorString(error));
      return 1;
    }
    long long begin = intervals[0].begin, end = intervals[0].end;
    for (int warp = 1; warp < warps; ++warp) {
      if (intervals[warp].begin < begin) begin = intervals[warp].begin;
      if (intervals[warp].end > end) end = intervals[warp].end;
    }
    if (repeat == 0 || end - begin < fastest) fastest = end - begin;
  }
  const double cycles = 4.0 * fastest / (static_cast<double>(warps) * kIterations * kPerIteration);
  std::printf("{\"probe\": \"%s\", \"cycles\": %.3f}\n", name, cycles);
  std::fflush(stdout);
  cudaFree(intervals);
  cudaFree(results);
  return 0;
}

template <class Instruction>
int measure() {
  return measure(Instruction::kName, probe<Instruction>, kThreads);
}

}  // namespace

int main() {
  cudaDeviceProp device;
  if (const cudaError_t error = cudaGetDeviceProperties(&device, 0); error != cudaSuccess) {
    std::fprintf(stderr, "probes: %s\n", cudaGetErrorString(error));
    return 1;
  }
  int failed = measure<Mma>() + measure<Tanh>() + measure<Ldmatrix>() + measure<Shuffle>() + measure<Ffma>() +
               measure<LdmatrixAndMma>() + measure<MmaAndFfma>();
  if (device.major == 9) {
    failed += measure(Wgmma<32>::kName, wgmma_probe<32>, kWgmmaThreads) +
              measure(Wgmma<96>::kName, wgmma_probe<96>, kWgmmaThreads);
  }
  return failed == 0 ? 0 : 1;
}
