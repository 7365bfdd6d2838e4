// Product of a bfloat16 tensor and one number on the device:
//
//   product[i] = factor·values[i],  multiplied in float32, rounded to nearest even
//
// values and product: [count], contiguous, aligned to 16 bytes. One pass, a thread for every 32 numbers: 4 bytes per
// number. Deterministic: a number of the product depends only on its own and on the factor. An empty tensor launches
// nothing.
#include "cuda/launch.h"
#include "cuda/primitives.h"
#include "deco/cuda/scaled_product.h"

namespace deco::cuda {

namespace {

// Every load has 16 bytes, so that at least 64 kB are in flight on a multiprocessor.
constexpr int kThreads = 256, kBlocksPerMultiprocessor = 4, kLoads = 4;
constexpr int kVector = 8;  // numbers of a Words4
constexpr int kBlockVectors = kThreads * kLoads;

struct ProductParams {
  const Words4* values;
  const float* factor;
  Words4* product;
  int64_t count;

  template <class V>
  void visit(V& buffers) const {
    buffers.read(values, 2 * count);
    buffers.read(factor, 4);
    buffers.write(product, 2 * count);
  }
};

DECO_DEVICE uint32_t scaled(float factor, uint32_t word) {
  return pack<BFloat16>(factor * low<BFloat16>(word), factor * high<BFloat16>(word));
}

// A thread multiplies kLoads vectors. The numbers after the last whole vector belong to the last thread block.
DECO_KERNEL(kThreads, kBlocksPerMultiprocessor, product_kernel, const ProductParams p) {
  const float factor = load(p.factor);
  const int64_t vectors = p.count / kVector, first = int64_t{block()} * kBlockVectors + thread();
  Words4 words[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (first + i * kThreads < vectors) words[i] = load(p.values + first + i * kThreads);
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Words4 w = words[i];
    if (first + i * kThreads < vectors)
      store_global(p.product + first + i * kThreads,
                   Words4{scaled(factor, w.x), scaled(factor, w.y), scaled(factor, w.z), scaled(factor, w.w)});
  }
  const int64_t rest = vectors * kVector + thread();
  if (block() == block_count() - 1 && rest < p.count) {
    const uint32_t word = load(reinterpret_cast<const uint16_t*>(p.values) + rest);
    store(reinterpret_cast<uint16_t*>(p.product) + rest, static_cast<uint16_t>(scaled(factor, word)));
  }
}

}  // namespace

Status scaled_product(const Call& call, const ScaledProduct& op) {
  if (op.count == 0) return {};
  constexpr int64_t kBlockNumbers = kBlockVectors * kVector;
  const LaunchSize size = {static_cast<int>((op.count + kBlockNumbers - 1) / kBlockNumbers), kThreads, 0};
  const ProductParams p = {static_cast<const Words4*>(op.values), op.factor, static_cast<Words4*>(op.product),
                           op.count};
  return launch("scaled_product", product_kernel, size, call.stream, p);
}

}  // namespace deco::cuda
