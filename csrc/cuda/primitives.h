// Primitives of the CUDA kernels, with two implementations: on the device (cuda/primitives_device.h, inline assembly)
// and on the host (emulation/primitives.h, one fiber per thread). Kernels use nothing below this layer.
//
// Kernels:       DECO_KERNEL(threads, blocks, name, parameters) { ... }; threads: size of the largest thread block, blocks:
//                thread blocks that must fit on a multiprocessor at once, parameters: one struct by value
//                wait_for_previous_kernel(): waits for the previous kernel, then lets the next one start early (launch.h)
// Indices:       thread(), lane(), warp(), block(), block_count(), block_threads(); block: thread block
//                UniformWarp: warp() for branches that no warp splits; constructed and read by all lanes
// Memory:        load(p), store(p, value), shared_memory(): every access of a kernel to shared and global memory;
//                store_global(p, words): global memory only, in one access
//                held(value), held(p): the same value or shared address, which the compiler keeps in a register and does
//                not compute anew; called by all lanes
// Copies:        copy_async(shared, global): starts to copy 8 or 16 bytes to shared memory; commit_copies(): the thread's
//                copies since the last call are one group; wait_for_copies<n>(): until at most the thread's n last groups
//                are under way. Other threads see a copy only behind a barrier after that
// Barriers:      block_barrier(), warp_barrier()
// In a warp:     shuffle_xor(value, mask): the value of lane ^ mask
// Arithmetic:    tanh_approximate(x) (largest relative error 2^-11), rsqrt_approximate(x)
// Compute dtype: pack<T>(low, high): two floats rounded to nearest even in one word; low<T>(word), high<T>(word);
//                half_of_low<T>(word), half_of_high<T>(word): the same, halved
//                float_of_bits(word): the float32 that is stored as `word`
//
// Matrix instructions of a warp, on 8x8 matrices of 16-bit elements. With g = lane / 4 and t = lane % 4, a lane holds
// one word of each matrix: the elements (g, 2t) and (g, 2t + 1).
//   load_matrices(words, row)             four matrices from shared memory; lanes 8i to 8i+7 give the addresses of the
//                                         rows (16 bytes each) of matrix i
//   load_matrices_transposed(words, row)  the same, each matrix transposed
//   store_matrices(row, words)            the inverse of load_matrices
//   transpose(word)                       one matrix transposed
//   multiply<T>(d, a, b, c)               d = a·b + c; a is 16x16 as quadrants (top left, bottom left, top right,
//                                         bottom right), or 16x8 as (top, bottom); b is 16x8 or 8x8, transposed
//                                         (lane: elements (2t, g) and (2t + 1, g)) as (top[, bottom]); c and d are 16x8
//                                         float32: elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include <cstdint>

namespace deco::cuda {

// 16-bit compute dtypes; only this layer interprets `bits`.
struct BFloat16 {
  uint16_t bits;
  static constexpr uint16_t kOne = 0x3f80;
};
struct Float16 {
  uint16_t bits;
  static constexpr uint16_t kOne = 0x3c00;
};

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

}  // namespace deco::cuda

#ifdef __CUDACC__
#include "cuda/primitives_device.h"
#else
#include "emulation/primitives.h"
#endif
