// Device implementation of cuda/primitives.h.
#pragma once

#include <cuda_runtime.h>

#define DECO_DEVICE __device__ __forceinline__
#define DECO_HOST_DEVICE __host__ __device__ __forceinline__
#define DECO_KERNEL(threads, blocks, name, parameters) \
  __global__ void __launch_bounds__(threads, blocks) name(parameters)

namespace deco::cuda {

// sm_90 and later; without it a kernel starts when the previous one has ended.
DECO_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DECO_DEVICE int thread() { return threadIdx.x; }
DECO_DEVICE int lane() { return threadIdx.x & 31; }
DECO_DEVICE int warp() { return threadIdx.x >> 5; }
DECO_DEVICE int block() { return blockIdx.x; }
DECO_DEVICE int block_count() { return gridDim.x; }
DECO_DEVICE int block_threads() { return blockDim.x; }

DECO_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char deco_shared_memory[];
  return deco_shared_memory;
}
template <class V>
DECO_DEVICE V load(const V* address) {
  return *address;
}
DECO_DEVICE Float2 load(const Float2* address) {
  const float2 v = *reinterpret_cast<const float2*>(address);
  return {v.x, v.y};
}
DECO_DEVICE Float4 load(const Float4* address) {
  const float4 v = *reinterpret_cast<const float4*>(address);
  return {v.x, v.y, v.z, v.w};
}
DECO_DEVICE Words2 load(const Words2* address) {
  const uint2 v = *reinterpret_cast<const uint2*>(address);
  return {v.x, v.y};
}
DECO_DEVICE Words4 load(const Words4* address) {
  const uint4 v = *reinterpret_cast<const uint4*>(address);
  return {v.x, v.y, v.z, v.w};
}
template <class V>
DECO_DEVICE void store(V* address, V value) {
  *address = value;
}
DECO_DEVICE void store(Float2* address, Float2 v) { *reinterpret_cast<float2*>(address) = make_float2(v.x, v.y); }
DECO_DEVICE void store(Float4* address, Float4 v) {
  *reinterpret_cast<float4*>(address) = make_float4(v.x, v.y, v.z, v.w);
}
DECO_DEVICE void store(Words2* address, Words2 v) { *reinterpret_cast<uint2*>(address) = make_uint2(v.x, v.y); }
DECO_DEVICE void store(Words4* address, Words4 v) {
  *reinterpret_cast<uint4*>(address) = make_uint4(v.x, v.y, v.z, v.w);
}

// An intrinsic, because the compiler may split a plain store to global memory into words.
DECO_DEVICE void store_global(Words2* address, Words2 v) {
  __stwb(reinterpret_cast<uint2*>(address), make_uint2(v.x, v.y));
}
DECO_DEVICE void store_global(Words4* address, Words4 v) {
  __stwb(reinterpret_cast<uint4*>(address), make_uint4(v.x, v.y, v.z, v.w));
}

DECO_DEVICE void block_barrier() { __syncthreads(); }
DECO_DEVICE void warp_barrier() { __syncwarp(); }
template <class V>
DECO_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The number from lane 0, by which the compiler knows that a branch does not split the warp. From sm_90 on it is read
// anew at every use, which takes fewer registers.
struct UniformWarp {
#if __CUDA_ARCH__ >= 900
  DECO_DEVICE operator int() const { return __shfl_sync(0xffffffffu, warp(), 0); }
#else
  int number = __shfl_sync(0xffffffffu, warp(), 0);
  DECO_DEVICE operator int() const { return number; }
#endif
};

// A shuffle hides from the compiler that the value is the lane's own.
template <class V>
DECO_DEVICE V held(V value) {
  return shuffle_xor(value, 0);
}

DECO_DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DECO_DEVICE float rsqrt_approximate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DECO_DEVICE float float_of_bits(uint32_t word) { return __uint_as_float(word); }
template <class T>
DECO_DEVICE uint32_t pack(float low, float high);
template <>
DECO_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
DECO_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <class T>
DECO_DEVICE float low(uint32_t word);
template <>
DECO_DEVICE float low<BFloat16>(uint32_t word) {
  return __uint_as_float(word << 16);
}
template <>
DECO_DEVICE float low<Float16>(uint32_t word) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(word)));
  return value;
}
template <class T>
DECO_DEVICE float high(uint32_t word);
template <>
DECO_DEVICE float high<BFloat16>(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}
template <>
DECO_DEVICE float high<Float16>(uint32_t word) {
  return low<Float16>(word >> 16);
}

// One instruction halves both numbers of a bfloat16 word. Only numbers below 2^-126 are rounded.
DECO_DEVICE uint32_t halves(uint32_t word) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(word), "r"(0x3f003f00u), "r"(0x80008000u));
  return result;
}
template <class T>
DECO_DEVICE float half_of_low(uint32_t word) {
  return 0.5f * low<T>(word);
}
template <>
DECO_DEVICE float half_of_low<BFloat16>(uint32_t word) {
  return low<BFloat16>(halves(word));
}
template <class T>
DECO_DEVICE float half_of_high(uint32_t word) {
  return 0.5f * high<T>(word);
}
template <>
DECO_DEVICE float half_of_high<BFloat16>(uint32_t word) {
  return high<BFloat16>(halves(word));
}

// Loads have no memory clobber: kernels always have a barrier between writes and matrix loads of the same memory.
DECO_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

template <class V>
DECO_DEVICE const V* held(const V* shared) {
  return static_cast<const V*>(__cvta_shared_to_generic(held(shared_address(shared))));
}

// Copies of 16 bytes go past the L1 cache.
DECO_DEVICE void copy_async(Words2* shared, const Words2* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DECO_DEVICE void copy_async(Words4* shared, const Words4* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
DECO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups>
DECO_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

DECO_DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)));
}
DECO_DEVICE void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)));
}
// stmatrix requires sm_90. On older architectures the lanes exchange row addresses and store their words.
DECO_DEVICE void store_matrices(void* row, const uint32_t (&words)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  const uint32_t own = shared_address(row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t address = __shfl_sync(0xffffffffu, own, 8 * i + (lane() >> 2)) + 4 * (lane() & 3);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(words[i]) : "memory");
  }
#endif
}
DECO_DEVICE uint32_t transpose(uint32_t word) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

#define DECO_MMA_16(TYPE)                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                     \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
#define DECO_MMA_8(TYPE)                                          \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE       \
      ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};" \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])            \
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))

template <class T>
DECO_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]);
template <>
DECO_DEVICE void multiply<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
  DECO_MMA_16("bf16");
}
template <>
DECO_DEVICE void multiply<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  DECO_MMA_16("f16");
}
template <class T>
DECO_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]);
template <>
DECO_DEVICE void multiply<BFloat16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
  DECO_MMA_8("bf16");
}
template <>
DECO_DEVICE void multiply<Float16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
  DECO_MMA_8("f16");
}

}  // namespace deco::cuda
