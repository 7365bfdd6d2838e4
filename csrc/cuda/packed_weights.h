// Weights in the layout of the kernels. Every call packs them into the workspace with a small kernel (pack_weights.cu).
//
// With n the normalized rows and w, b the affine of LayerNorm, (n·w + b)·(1 + scale) + shift = n·scale' + shift' for
//   scale' = w·(1 + scale):            W_scale' = diag(w)·W_scale,            bias' = w·(1 + b_scale)
//   shift' = shift + b·(1 + scale):    W_shift' = W_shift + diag(b)·W_scale,  bias' = b_shift + b·(1 + b_scale)
// so the kernels need no affine. fc1 is halved because the kernels evaluate SiLU(2x). Matrices are rounded to the
// compute dtype once, after folding. A bias keeps its float32 value, split into three numbers of the compute dtype
// after its row (tile.h). The pixel table stays float32. Rows and columns of matrices are in the column order of
// tile.h.
#pragma once

#include "cuda/launch.h"
#include "cuda/pixels.h"
#include "cuda/tile.h"
#include "deco/pixel_decoder.h"

namespace deco::cuda {

enum BlockMatrix { kShift, kScale, kGate, kFc1, kFc2, kBlockMatrices };
constexpr int kModulationMatrices = 3;  // the first three: without the MLP

constexpr int kChannelSlots = 8;  // inner size of matmuls with image channels: four values, then four remainders
constexpr int kMaxChannels = 4;

// Rows of the packed pixel table: whole tiles, which repeat the patch if it has fewer pixels than a tile.
DECO_HOST_DEVICE int table_rows(int pixels_per_token) {
  return pixels_per_token < kTilePixels ? kTilePixels : pixels_per_token;
}

// Packed weights in global memory. `pixel`, `head` and `table` are null for a single decoder block.
struct PackedWeights {
  void* matrices = nullptr;  // [N, M, D, D + 8] of the compute dtype, M = 5, or 3 without the MLP
  void* pixel = nullptr;     // [D, 8]: the C columns of pixel_weight, twice
  void* head = nullptr;      // [8, D + 8]: the C rows of head_weight with bias, twice
  float* table = nullptr;    // [table_rows(P) / 16, D / 8, lanes, 4]: the pixel table in the register layout of Tile

  static PackedWeights take(WorkspaceParts& parts, int depth, int width, int matrices, int pixels = 0);

  template <class V>
  void visit(V& buffers, bool write, int depth, int width, int matrices_per_block, int pixels) const {
    const int64_t rows = int64_t{depth} * matrices_per_block * width;
    const auto declare = [&](void* data, int64_t bytes) {
      write ? buffers.write(data, bytes) : buffers.read(data, bytes);
    };
    declare(matrices, 2 * rows * (width + kBiasSlots));
    declare(pixel, 2 * kChannelSlots * width);
    declare(head, 2 * kChannelSlots * (width + kBiasSlots));
    declare(table, int64_t{4} * table_rows(pixels) * width);
  }
};

// Launch the packing of a decoder, or of one decoder block with `matrices` matrices.
Status pack_decoder(const Call& call, DType operand, const PackedWeights& packed, const DecoderWeightArrays& weights,
                    const DecoderShape& shape);
Status pack_block(const Call& call, DType operand, const PackedWeights& packed, const BlockWeightArrays& weights,
                  int width, int matrices);

// ---- in shared memory -----------------------------------------------------------------------------------------------

// Copies packed weights to shared memory. Called by all threads of the thread block; no barrier.
DECO_DEVICE void copy_words(char* to, const void* from, int bytes) {
  for (int i = thread(); i < bytes / 16; i += block_threads())
    store(reinterpret_cast<Words4*>(to) + i, load(static_cast<const Words4*>(from) + i));
}

// Matrices [M][D][kRowStride] of one decoder block.
template <class T, int D>
struct BlockWeights {
  const T *matrices, *weights, *biases;  // the latter two: of the lane (tile.h), in the first matrix
  BiasSelector selector;

  DECO_DEVICE const T* matrix(int which) const { return matrices + which * D * kRowStride<D>; }
  DECO_DEVICE Linear<T, D> linear(int which) const {
    return {weights + which * D * kRowStride<D>, biases + which * D * kRowStride<D>, selector};
  }
  // The matrices `elements` later in shared memory.
  DECO_DEVICE BlockWeights later(int elements) const {
    return {matrices + elements, weights + elements, biases + elements, selector};
  }
};

// Shared memory for the weights of decoder blocks: one slot for each, or one slot that is refilled for each.
template <class T, int D, int Matrices = kBlockMatrices>
struct BlockSlots {
  static constexpr int kElements = Matrices * D * kRowStride<D>, kBytes = 2 * kElements;  // of one decoder block

  char* memory;

  DECO_DEVICE BlockWeights<T, D> first() const {
    const T* matrices = reinterpret_cast<const T*>(memory);
    return {matrices, lane_weights<T, D>(matrices), lane_biases<T, D>(matrices), bias_selector<T>()};
  }
  // The same with values that stay in registers, for loops over decoder blocks.
  DECO_DEVICE BlockWeights<T, D> first_held() const {
    const BlockWeights<T, D> w = first();
    return {w.matrices, held(w.weights), held(w.biases), bias_selector_in_two_registers<T>()};
  }

  DECO_DEVICE void fill(int slot, const PackedWeights& packed, int index) const {
    copy_words(memory + slot * kBytes, static_cast<const char*>(packed.matrices) + int64_t{index} * kBytes, kBytes);
  }
};

// Weights of the embedding and the head in shared memory: pixel [D][8] and head [8][kRowStride].
template <class T, int D>
struct DecoderEnds {
  static constexpr int kPixelBytes = D * kChannelSlots * 2, kHeadBytes = kChannelSlots * kRowStride<D> * 2;
  static constexpr int kBytes = kPixelBytes + kHeadBytes;

  char* memory;

  DECO_DEVICE const T* pixel() const { return reinterpret_cast<const T*>(memory); }
  DECO_DEVICE const T* head() const { return reinterpret_cast<const T*>(memory + kPixelBytes); }
  DECO_DEVICE Linear<T, D, kChannelSlots> head(const BiasSelector& selector) const {
    return {lane_weights<T, D>(head()), lane_biases<T, D, kChannelSlots>(head()), selector};
  }

  DECO_DEVICE void fill(const PackedWeights& packed) const {
    copy_words(memory, packed.pixel, kPixelBytes);
    copy_words(memory + kPixelBytes, packed.head, kHeadBytes);
  }
};

}  // namespace deco::cuda
