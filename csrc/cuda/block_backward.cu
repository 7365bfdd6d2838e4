// Backward of one decoder block (block.h): recompute it, then run it backwards. With δx the gradient of x:
//
//   δgate = δh'·u;  δu = δh'·gate;  δz = (W_2ᵀ·δu)·SiLU'(z);  δm = W_1ᵀ·δz;  δshift = δm;  δscale = δm·n
//   δh = δh' + LayerNorm'(δm·scale);  δs = W_shiftᵀ·δshift + W_scaleᵀ·δscale + W_gateᵀ·δgate;  δcond = δs·SiLU'(cond)
//   δW = Σ over pixels of δoutput ⊗ input, δb = Σ δoutput
//
// A chain warp owns 16 pixels at a time and keeps its activations in registers; the rounded operands of the weight
// gradients go to shared memory. After a barrier each of M gradient warps adds up the gradient of one matrix over the
// pixels of all chain warps, in registers, for all tiles the block walks over. Up to D 32 every warp is both; at D 64
// registers do not hold both, and the roles have warps of their own.
// Per pixel: 10·D bytes read and written at most (h, cond, δh', δs in and out, δh); 2·15·D² FLOPs. Sums over pixels are
// taken in the order of the grid, see gradient_sums.h.
#include <algorithm>

#include "cuda/block.h"
#include "cuda/block_backward.h"
#include "cuda/decoder_geometry.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

namespace {

constexpr int matrices_of(bool mlp) { return mlp ? kBlockMatrices : kModulationMatrices; }

template <int D, bool Mlp>
struct Plan {
  static constexpr int kMatrices = matrices_of(Mlp);
  static constexpr bool kSpecialised = D == 64;
  static constexpr int kGradientWarps = kMatrices;
  static constexpr int kMostChainWarps = kSpecialised ? 7 : kGradientWarps;
  static constexpr int kThreads = 32 * (kSpecialised ? kMostChainWarps + kGradientWarps : kGradientWarps);
  static constexpr int kBlocksPerMultiprocessor = kSpecialised ? 1 : D == 32 ? 2 : 3;

  // Operand tiles in shared memory: s, the gradients of the M outputs, then m and SiLU(z).
  static constexpr int kS = 0, kOutputs = 1, kM = 6, kA = 7, kTiles = Mlp ? 8 : 4;
  static constexpr int kTileElements = kTilePixels * kRowStride<D>;  // of one warp

  static DECO_HOST_DEVICE int input_of(int matrix) { return matrix == kFc1 ? kM : matrix == kFc2 ? kA : kS; }
  static constexpr int shared_bytes(int chain_warps) {
    return BlockSlots<BFloat16, D, kMatrices>::kBytes + kTiles * chain_warps * kTileElements * 2;
  }
};

struct BackwardParams {
  PackedWeights packed;
  PatchRows cond;
  RowsView h, grad, grad_gate, grad_h, grad_cond;
  const void *h_tiles = nullptr, *s_tiles = nullptr;
  void* grad_tiles = nullptr;
  float* partials = nullptr;
  uint32_t pixels = 0;
  int block = 0, depth = 1, width = 0, chain_warps = 0, parts = 0;
  bool first = true, last = true, accumulate = false, mlp = true;
  float eps = 0;

  template <class V>
  void visit(V& buffers) const {
    const int matrices = matrices_of(mlp);
    packed.visit(buffers, false, depth, width, matrices, 0);
    cond.visit(buffers, pixels, width);
    for (const RowsView* rows : {&h, &grad, &grad_gate}) rows->visit(buffers, false, pixels, width);
    for (const RowsView* rows : {&grad_h, &grad_cond}) rows->visit(buffers, true, pixels, width);
    const int64_t tile_bytes = 2 * padded_rows(pixels) * width;
    buffers.read(h_tiles, tile_bytes);
    buffers.read(s_tiles, tile_bytes);
    buffers.write(grad_tiles, tile_bytes);
    buffers.write(partials, int64_t{4} * parts * depth * matrices * width * (width + 1));
  }
};

// The 16 pixels of a chain warp, and where their operands go.
template <class T, int D, bool Mlp, bool Tiled>
struct Chain {
  using P = Plan<D, Mlp>;
  const BackwardParams& p;
  const BlockWeights<T, D> w;
  T* tiles;         // the warp's part of tile 0
  int tile_stride;  // elements from tile to tile
  uint32_t tile;    // the warp's number among operand tiles; the last one if there is none
  bool tile_exists;
  uint32_t pixel[2];  // the lane's rows; the last pixel for those that do not exist
  bool valid[2];      // whether they exist

  DECO_DEVICE void keep(int tile, const Operand<D>& operand) const {
    store_operand_tile<T, D>(tiles + tile * tile_stride, operand);
  }
  // What was kept, read back where holding it would cost registers for long.
  DECO_DEVICE Operand<D> kept(int tile) const {
    warp_barrier();
    return load_operand_tile<T, D>(tiles + tile * tile_stride);
  }

  // Between these two an operand waits in a tile that is not needed yet where registers do not hold it: at D 64.
  DECO_DEVICE void set_aside(int tile, const Operand<D>& operand) const {
    if constexpr (P::kSpecialised) keep(tile, operand);
  }
  DECO_DEVICE Operand<D> taken_up(int tile, const Operand<D>& operand) const {
    if constexpr (!P::kSpecialised) return operand;
    const Operand<D> again = kept(tile);
    warp_barrier();
    return again;
  }

  // Rows of a gradient; zero for pixels that do not exist, so that they add nothing to any sum.
  DECO_DEVICE Tile<D> gradient_tile(const RowsView& rows) const {
    RowWords<D> pair[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (Tiled)
        pair[r] = row_of(load_tile<D>(p.grad_tiles, tile), r);
      else
        pair[r] = load_row<T, D>(rows, pixel[r]);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) pair[r].word[j] = valid[r] ? pair[r].word[j] : 0u;
    }
    return tile_of<T>(pair[0], pair[1]);
  }

  DECO_DEVICE void run() const {
    Operand<D> s[1];
    Tile<D> normalized;  // h at first
    if constexpr (Tiled) {
      s[0] = load_tile<D>(p.s_tiles, tile);
      normalized = tile_of<T>(load_tile<D>(p.h_tiles, tile));
    } else {
      s[0] = silu_operand<T>(load_row<T, D>(p.cond, pixel[0]), load_row<T, D>(p.cond, pixel[1]));
      normalized = tile_of<T>(load_row<T, D>(p.h, pixel[0]), load_row<T, D>(p.h, pixel[1]));
    }
    keep(P::kS, s[0]);
    const RowPair rstd = normalize(normalized, p.eps);

    Tile<D> grad_h, grad_m;
    Operand<D> grad_gate, scale;
    if constexpr (Mlp) {
      recompute(grad_h, grad_m, grad_gate, scale, s, normalized);
    } else {
      grad_m = gradient_tile(p.grad);
      grad_gate = rounded<T>(gradient_tile(p.grad_gate));
      const Linear<T, D> to_scale = w.linear(kScale);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        float v[1][4];
        to_scale.apply(v, s, j);
        scale.template set<T>(j, v[0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_h.v[j][i] = 0.0f;
      }
      set_aside(P::kOutputs + kScale, scale);
    }
    keep(P::kOutputs + kGate, grad_gate);

    const Operand<D> grad_shift = rounded<T>(grad_m);
    const Operand<D> scale_again = taken_up(P::kOutputs + kScale, scale);
    Operand<D> grad_scale;
    Tile<D> grad_normalized;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = grad_m.v[j][i] * normalized.v[j][i];
      grad_scale.template set<T>(j, v);
      multiply_by(grad_normalized.v[j], grad_m.v[j], scale_again, j);
    }
    keep(P::kOutputs + kShift, grad_shift);
    keep(P::kOutputs + kScale, grad_scale);
    add_normalize_gradient(grad_h, grad_normalized, normalized, rstd);
    if constexpr (Tiled) {
      if (tile_exists) store_tile<D>(p.grad_tiles, tile, rounded<T>(grad_h));
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (valid[r]) store_row<T, D>(p.grad_h, pixel[r], row_of<T>(grad_h, r));
    }
    if (p.grad_cond.data == nullptr) return;
    const Operand<D> grad_gate_again = kept(P::kOutputs + kGate);
    Tile<D> grad_s;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_s.v[j][i] = 0.0f;
      multiply_add<T, D>(grad_s.v[j], grad_shift, weight_columns<T, D>(w.matrix(kShift) + 8 * j));
      multiply_add<T, D>(grad_s.v[j], grad_scale, weight_columns<T, D>(w.matrix(kScale) + 8 * j));
      multiply_add<T, D>(grad_s.v[j], grad_gate_again, weight_columns<T, D>(w.matrix(kGate) + 8 * j));
    }
    finish_cond(grad_s);
  }

  // The block again, and back to m: grad_h = δh', grad_m = δm, grad_gate = δgate.
  DECO_DEVICE void recompute(Tile<D>& grad_h, Tile<D>& grad_m, Operand<D>& grad_gate, Operand<D>& scale,
                             const Operand<D> (&s)[1], const Tile<D>& normalized) const {
    Operand<D> modulated[1], activated[1], slope, grad_u, grad_z;
    const Linear<T, D> to_shift = w.linear(kShift), to_scale = w.linear(kScale);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float shift[1][4], scales[1][4], v[4];
      to_shift.apply(shift, s, j);
      to_scale.apply(scales, s, j);
      scale.template set<T>(j, scales[0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = fmaf(normalized.v[j][i], scales[0][i], shift[0][i]);
      modulated[0].template set<T>(j, v);
    }
    keep(P::kM, modulated[0]);
    set_aside(P::kOutputs + kScale, scale);
    const Linear<T, D> fc1 = w.linear(kFc1);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float z[1][4], value[4], slopes[4];
      fc1.apply(z, modulated, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SiluGradient silu = silu_of_double_gradient(z[0][i]);
        value[i] = silu.value;
        slopes[i] = silu.slope;
      }
      activated[0].template set<T>(j, value);
      slope.template set<T>(j, slopes);
    }
    keep(P::kA, activated[0]);
    set_aside(P::kOutputs + kShift, slope);
    grad_h = gradient_tile(p.grad);
    const Operand<D> s_again[1] = {kept(P::kS)};
    const Linear<T, D> to_gate = w.linear(kGate), fc2 = w.linear(kFc2);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float gate[1][4], u[1][4];
      to_gate.apply(gate, s_again, j);
      fc2.apply(u, activated, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[0][i] *= grad_h.v[j][i];
        gate[0][i] *= grad_h.v[j][i];
      }
      grad_gate.template set<T>(j, u[0]);
      grad_u.template set<T>(j, gate[0]);
    }
    keep(P::kOutputs + kFc2, grad_u);
    const Operand<D> slope_again = taken_up(P::kOutputs + kShift, slope);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float grad_a[4] = {0, 0, 0, 0}, v[4];
      multiply_add<T, D>(grad_a, grad_u, weight_columns<T, D>(w.matrix(kFc2) + 8 * j));
      multiply_by(v, grad_a, slope_again, j);
      grad_z.template set<T>(j, v);
    }
    keep(P::kOutputs + kFc1, grad_z);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_m.v[j][i] = 0.0f;
      multiply_add<T, D>(grad_m.v[j], grad_z, weight_columns<T, D>(w.matrix(kFc1) + 8 * j));
    }
  }

  // Adds what later blocks found and, in the last step of the chain, turns δs into δcond.
  DECO_DEVICE void finish_cond(Tile<D>& grad) const {
    if (!p.first) {
      // region: gradient_of_later_blocks
      const Tile<D> before = tile_of<T>(load_row<T, D>(p.grad_cond, pixel[0]), load_row<T, D>(p.grad_cond, pixel[1]));
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) grad.v[j][i] += before.v[j][i];
      // end region
    }
    if (p.last) {
      // region: gradient_of_cond
      const Tile<D> cond = tile_of<T>(load_row<T, D>(p.cond, pixel[0]), load_row<T, D>(p.cond, pixel[1]));
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) grad.v[j][i] *= 0.5f * silu_of_double_gradient(0.5f * cond.v[j][i]).slope;
      // end region
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (valid[r]) store_row<T, D>(p.grad_cond, pixel[r], row_of<T>(grad, r));
  }

  // out = v times column tile j of an operand.
  static DECO_DEVICE void multiply_by(float (&out)[4], const float (&v)[4], const Operand<D>& operand, int j) {
    const uint32_t upper = operand.k_step[j / 2][2 * (j % 2)], lower = operand.k_step[j / 2][2 * (j % 2) + 1];
    out[0] = v[0] * low<T>(upper);
    out[1] = v[1] * high<T>(upper);
    out[2] = v[2] * low<T>(lower);
    out[3] = v[3] * high<T>(lower);
  }
};

template <class T, int D, bool Mlp, bool Tiled>
DECO_KERNEL((Plan<D, Mlp>::kThreads), (Plan<D, Mlp>::kBlocksPerMultiprocessor))
backward_kernel(const BackwardParams p) {
  using P = Plan<D, Mlp>;
  const BlockSlots<T, D, P::kMatrices> slots{shared_memory()};
  auto* tiles = reinterpret_cast<T*>(shared_memory() + slots.kBytes);
  const int tile_stride = p.chain_warps * P::kTileElements;
  const uint32_t block_pixels = p.chain_warps * kTilePixels, step = block_count() * block_pixels;
  slots.fill(0, p.packed, p.block);
  block_barrier();
  const BlockWeights<T, D> weights = slots.block(0, bias_selector<T>());
  const bool sums = p.partials != nullptr;

  const auto run_chain = [&](uint32_t begin) {
    const uint32_t tile = begin / kTilePixels + warp(), end = p.pixels - 1, last_tile = end / kTilePixels;
    const uint32_t first = tile * kTilePixels + (lane() >> 2);
    const Chain<T, D, Mlp, Tiled> chain{p,
                                        weights,
                                        tiles + warp() * P::kTileElements,
                                        tile_stride,
                                        min(tile, last_tile),
                                        tile <= last_tile,
                                        {min(first, end), min(first + 8, end)},
                                        {first <= end, first + 8 <= end}};
    chain.run();
  };
  const int matrix = P::kSpecialised ? warp() - p.chain_warps : warp();
  const T* output = tiles + (P::kOutputs + matrix) * tile_stride;
  const T* input = tiles + P::input_of(matrix) * tile_stride;
  MatrixGradient<T, D> gradient;
  const auto add_tiles = [&] {
#pragma unroll 1
    for (int w = 0; w < p.chain_warps; ++w) gradient.add(output + w * P::kTileElements, input + w * P::kTileElements);
  };
  const auto write_gradient = [&] {
    constexpr int kNumbers = D * (D + 1);
    const int64_t place = (int64_t{block()} * p.depth + p.block) * P::kMatrices + matrix;
    gradient.write(p.partials + place * kNumbers, p.accumulate);
  };

  if constexpr (P::kSpecialised) {
    if (warp() < p.chain_warps) {
      for (uint32_t begin = block() * block_pixels; begin < p.pixels; begin += step) {
        run_chain(begin);
        block_barrier();
        block_barrier();
      }
    } else {
      gradient.clear();
      for (uint32_t begin = block() * block_pixels; begin < p.pixels; begin += step) {
        block_barrier();
        if (sums) add_tiles();
        block_barrier();
      }
      if (sums) write_gradient();
    }
  } else {
    gradient.clear();
    for (uint32_t begin = block() * block_pixels; begin < p.pixels; begin += step) {
      run_chain(begin);
      if (sums) {
        // region: barrier_before_weight_gradients
        block_barrier();
        // end region
        add_tiles();
        block_barrier();
      }
    }
    if (sums) write_gradient();
  }
}

// Chain warps of a block on this device: at D 64 as many as shared memory holds.
template <int D, bool Mlp>
int chain_warps(const DeviceLimits& limits) {
  using P = Plan<D, Mlp>;
  int warps = P::kMostChainWarps;
  while (warps > 1 && P::shared_bytes(warps) > limits.shared_bytes) --warps;
  return P::kSpecialised ? warps : P::kMostChainWarps;
}

template <int D, bool Mlp>
int parts_of(const DeviceLimits& limits, int64_t pixels) {
  return grid_blocks(pixels, chain_warps<D, Mlp>(limits) * kTilePixels, limits, Plan<D, Mlp>::kBlocksPerMultiprocessor);
}

template <class T, int D, bool Mlp, bool Tiled>
Status run(const Call& call, BackwardParams p) {
  using P = Plan<D, Mlp>;
  p.chain_warps = chain_warps<D, Mlp>(call.limits);
  p.parts = parts_of<D, Mlp>(call.limits, p.pixels);
  const int warps = P::kSpecialised ? p.chain_warps + P::kGradientWarps : P::kGradientWarps;
  return launch("block_backward", backward_kernel<T, D, Mlp, Tiled>,
                {p.parts, 32 * warps, P::shared_bytes(p.chain_warps)}, call.stream, p);
}

}  // namespace

int block_backward_parts(const DeviceLimits& limits, int width, bool mlp, int64_t pixels) {
  int parts = 0;
  with_kernel(DType::kBFloat16, width, [&](auto, auto w) {
    parts = mlp ? parts_of<w.value, true>(limits, pixels) : parts_of<w.value, false>(limits, pixels);
    return Status{};
  });
  return parts;
}

Status block_backward(const Call& call, const BlockBackward& op) {
  BackwardParams p;
  p.packed = op.packed;
  p.h = op.h;
  p.cond = op.cond;
  p.h_tiles = op.h_tiles;
  p.s_tiles = op.s_tiles;
  p.grad_tiles = op.grad_tiles;
  p.grad = op.grad;
  p.grad_gate = op.grad_gate;
  p.grad_h = op.grad_h;
  p.grad_cond = op.grad_cond;
  p.partials = op.partials;
  p.pixels = static_cast<uint32_t>(op.pixels);
  p.block = op.block;
  p.depth = op.depth;
  p.width = op.width;
  p.first = op.first;
  p.last = op.last;
  p.accumulate = op.accumulate;
  p.mlp = op.mlp;
  p.eps = op.eps;
  return with_kernel(op.operand, op.width, [&](auto type, auto width) {
    using T = decltype(type);
    if (!op.mlp) return run<T, width.value, false, false>(call, p);
    return op.h_tiles != nullptr ? run<T, width.value, true, true>(call, p) : run<T, width.value, true, false>(call, p);
  });
}

}  // namespace deco::cuda
