// Backward of one decoder block. With the names of block.h, n = LayerNorm(h), z the input of the inner SiLU, u the
// factor of the gate, and δx the gradient of x:
//
//   recompute  m = n·scale + shift;  a = SiLU(z), z = W_1·m + b_1;  u = W_2·a + b_2
//   chain      δgate = δh'·u;  δu = δh'·gate
//              δz = (W_2ᵀ·δu)·SiLU'(z);  δm = W_1ᵀ·δz
//              δshift = δm;  δscale = δm·n;  δh = δh' + LayerNorm'(δm·scale)
//              δs = W_shiftᵀ·δshift + W_scaleᵀ·δscale + W_gateᵀ·δgate;  δcond = δs·SiLU'(cond)
//   weights    δW = Σ over pixels of δoutput ⊗ input;  δb = Σ over pixels of δoutput
//
// Persistent grid. A chain warp owns 16 pixels at a time: it recomputes the forward, runs the chain with activations in
// registers, and stores the rounded operands of the weight gradients in shared memory, next to the packed weights.
// After a barrier each of M gradient warps adds the gradient of one matrix over the pixels of all chain warps, in
// registers, for all tiles of the thread block. At D = 16, and without the MLP at D = 32, every warp has both roles.
// Else chain and gradient warps are separate: together the roles take too many registers. If shared memory holds the
// operands of two turns, the chain computes those of the next turn meanwhile; with less, fewer warps run the chain. If
// it also holds the inputs of a tile, asynchronous copies bring them ahead of their use.
// Per pixel: at most 10·D bytes (h, cond, δh', δs in and out, δh) and 2·15·D² FLOPs. Deterministic: sums over pixels
// have the fixed order of the grid (gradient_sums.h).
#include <algorithm>

#include "cuda/block.h"
#include "cuda/block_backward.h"
#include "cuda/copied_inputs.h"
#include "cuda/decoder_geometry.h"
#include "cuda/gradient_sums.h"

namespace deco::cuda {

namespace {

constexpr int matrices_of(bool mlp) { return mlp ? kBlockMatrices : kModulationMatrices; }

template <int D, bool Mlp>
struct Plan {
  static constexpr int kMatrices = matrices_of(Mlp);
  static constexpr bool kSpecialized = D == 64 || (D == 32 && Mlp);
  static constexpr bool kFewRegisters = D == 64;
  static constexpr bool kOverlaps = kSpecialized && D == 32;  // at D = 64 shared memory holds the operands of one turn
  static constexpr int kGradientWarps = kMatrices;
  static constexpr int kMostChainWarps = !kSpecialized ? kGradientWarps : D == 64 ? 7 : 10;
  static constexpr int kThreads = 32 * (kSpecialized ? kMostChainWarps + kGradientWarps : kGradientWarps);
  static constexpr int kBlocksPerMultiprocessor = kSpecialized ? 1 : D == 32 ? 2 : 3;

  // Operand tiles in shared memory: s, the gradients of the M outputs, then m and SiLU(z).
  static constexpr int kS = 0, kOutputs = 1, kM = 6, kA = 7, kTiles = Mlp ? 8 : 4;
  static_assert(BlockSlots<BFloat16, D, kMatrices>::kBytes % 128 == 0, "operand tiles follow the weights");
  static constexpr int kTileElements = kTilePixels * D;  // one operand of one warp
  static constexpr int kWarpElements = kTiles * kTileElements;

  static DECO_HOST_DEVICE int input_of(int matrix) { return matrix == kFc1 ? kM : matrix == kFc2 ? kA : kS; }
  // Shared memory: the weights, the inputs of all chain warps if they are copied, operand tiles.
  static constexpr DECO_HOST_DEVICE int input_bytes(bool ahead) {
    return ahead ? kMostChainWarps * CopiedInputs<D>::kBytes : 0;
  }
  static constexpr int shared_bytes(int chain_warps, int buffers, bool ahead) {
    const int of_operands = buffers * chain_warps * kWarpElements * 2;
    return BlockSlots<BFloat16, D, kMatrices>::kBytes + input_bytes(ahead) + of_operands;
  }
};

// Argument of the kernel.
struct BackwardParams : BlockBackward {
  template <class V>
  void visit(V& buffers) const {
    const int matrices = matrices_of(mlp);
    packed.visit(buffers, false, depth, width, matrices, 0);
    cond.visit(buffers, pixels, width);
    for (const RowsView* rows : {&h, &grad, &grad_gate}) rows->visit(buffers, false, pixels, width);
    for (const RowsView* rows : {&grad_h, &grad_cond}) rows->visit(buffers, true, pixels, width);
    const int64_t tile_bytes = 2 * tiled_values(pixels, width);
    buffers.read(h_tiles, tile_bytes);
    buffers.read(s_tiles, tile_bytes);
    buffers.write(grad_tiles, tile_bytes);
    buffers.write(partials, int64_t{4} * parts * depth * matrices * width * (width + 1));
  }
};

// Recompute and chain of one warp on its 16 pixels.
template <class T, int D, bool Mlp, bool Tiled, bool Ahead>
struct Chain {
  using P = Plan<D, Mlp>;
  const BackwardParams& p;
  const BlockWeights<T, D> w;
  T* operands;             // the warp's operand tiles in shared memory
  CopiedInputs<D> inputs;  // the warp's
  uint32_t tile;           // index of the warp's operand tile in global memory, at most that of the last tile
  bool tile_exists;
  uint32_t pixel[2];  // the lane's two rows, at most the last pixel
  bool valid[2];      // whether the rows exist
  uint32_t next_tile;
  bool has_next;  // a turn, in which the tile may be missing

  // Starts to copy what a tile needs first.
  static DECO_DEVICE void copy_ahead(const BackwardParams& p, const CopiedInputs<D>& inputs, uint32_t tile) {
    inputs.copy_tile(kInputS, p.s_tiles, tile);
    inputs.copy_tile(kInputH, p.h_tiles, tile);
    inputs.copy_tile(kInputGrad, p.grad_tiles, tile);
  }
  // Called after the last use of these inputs in this turn.
  DECO_DEVICE void copy_next() const {
    if constexpr (!Ahead) return;
    if (has_next) copy_ahead(p, inputs, next_tile);
    commit_copies();
  }
  // Starts to copy what run_cond needs at the end of this turn, and waits for what copy_next() of the last turn copies.
  DECO_DEVICE void copy_rows_of_cond() const {
    if constexpr (!Ahead) return;
    if (p.grad_cond.data != nullptr) {
      if (!p.first) inputs.template copy_rows<T>(kInputGradS, p.grad_cond, pixel);
      if (p.last) inputs.template copy_rows<T>(kInputCond, p.cond, pixel);
    }
    commit_copies();
    // region: wait_for_inputs
    wait_for_copies<1>();
    // end region
  }

  DECO_DEVICE void run() const {
    copy_rows_of_cond();
    const Operand<D> s = load_s();
    const Operand<D> h = load_h();
    put(P::kS, s);
    const RowStatistics stats = statistics(tile_of<T>(h), p.eps);
    Tile<D> normalized = normalized_by(stats, tile_of<T>(h));

    Tile<D> grad_h, grad_m;  // grad_h: first of h', finally of h
    Operand<D> grad_gate, scale;
    if constexpr (Mlp) {
      Operand<D> slope;
      const Operand<D> m = recompute_m(s, normalized, scale);
      put(P::kM, m);
      spill(P::kOutputs + kScale, scale);
      const Operand<D> a = recompute_a(m, slope);
      put(P::kA, a);
      spill(P::kOutputs + kFc1, slope);
      grad_h = tile_of<T>(load_gradient(p.grad));
      const Operand<D> grad_u = multiplied(kGate, reload(P::kS), grad_h);  // δu = δh'·gate
      grad_gate = multiplied(kFc2, a, grad_h);                             // δgate = δh'·u
      put(P::kOutputs + kFc2, grad_u);
      const Operand<D> grad_z = run_activation(grad_u, reload_spilled(P::kOutputs + kFc1, slope));
      put(P::kOutputs + kFc1, grad_z);
      grad_m = run_fc1(grad_z);
    } else {
      grad_m = tile_of<T>(load_gradient(p.grad));
      grad_gate = load_gradient(p.grad_gate);
      scale = recompute_scale(s);
      grad_h = zeros<D>();
      spill(P::kOutputs + kScale, scale);
    }
    put(P::kOutputs + kGate, grad_gate);

    const Operand<D> grad_shift = rounded<T>(grad_m);  // δshift = δm
    if constexpr (P::kFewRegisters || Ahead)  // again, to shorten the lifetime of its registers, like δh' below
      normalized = normalized_by(stats, tile_of<T>(load_h()));
    Tile<D> grad_normalized;
    const Operand<D> grad_scale =
        run_modulation(grad_normalized, grad_m, normalized, reload_spilled(P::kOutputs + kScale, scale));
    put(P::kOutputs + kShift, grad_shift);
    if constexpr (!P::kFewRegisters) copy_next();
    put(P::kOutputs + kScale, grad_scale);
    if constexpr (P::kFewRegisters && Mlp) grad_h = tile_of<T>(load_gradient(p.grad));
    if constexpr (P::kFewRegisters) copy_next();
    add_normalize_gradient(grad_h, grad_normalized, normalized, stats.rstd);  // δh = δh' + LayerNorm'(δn)
    store_gradient_of_h(grad_h);
    if (p.grad_cond.data != nullptr) run_cond(grad_shift, grad_scale, reload(P::kOutputs + kGate));
  }

  // ---- recompute ----------------------------------------------------------------------------------------------------

  // m = n·scale + shift
  DECO_DEVICE Operand<D> recompute_m(const Operand<D>& s, const Tile<D>& normalized, Operand<D>& scale) const {
    Operand<D> m;
    const Linear<T, D> to_shift = w.linear(kShift), to_scale = w.linear(kScale);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float shift[4], scales[4], v[4];
      to_shift.apply(shift, s, j);
      to_scale.apply(scales, s, j);
      scale.template set<T>(j, scales);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = fmaf(normalized.v[j][i], scales[i], shift[i]);
      m.template set<T>(j, v);
    }
    return m;
  }

  DECO_DEVICE Operand<D> recompute_scale(const Operand<D>& s) const {
    Operand<D> scale;
    const Linear<T, D> to_scale = w.linear(kScale);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float v[4];
      to_scale.apply(v, s, j);
      scale.template set<T>(j, v);
    }
    return scale;
  }

  // a = SiLU(z) with z = W_1·m + b_1; slope = SiLU'(z)
  DECO_DEVICE Operand<D> recompute_a(const Operand<D>& m, Operand<D>& slope) const {
    Operand<D> a;
    const Linear<T, D> fc1 = w.linear(kFc1);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float z[4], values[4], slopes[4];
      fc1.apply(z, m, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SiluGradient silu = silu_of_double_gradient(z[i]);
        values[i] = silu.value;
        slopes[i] = silu.slope;
      }
      a.template set<T>(j, values);
      slope.template set<T>(j, slopes);
    }
    return a;
  }

  // ---- chain --------------------------------------------------------------------------------------------------------

  // δh'·(W·x + b), elementwise
  DECO_DEVICE Operand<D> multiplied(BlockMatrix matrix, const Operand<D>& x, const Tile<D>& grad_out) const {
    Operand<D> result;
    const Linear<T, D> linear = w.linear(matrix);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float v[4];
      linear.apply(v, x, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= grad_out.v[j][i];
      result.template set<T>(j, v);
    }
    return result;
  }

  // δz = (W_2ᵀ·δu)·SiLU'(z)
  DECO_DEVICE Operand<D> run_activation(const Operand<D>& grad_u, const Operand<D>& slope) const {
    Operand<D> grad_z;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float grad_a[4] = {0, 0, 0, 0}, v[4];
      add_transposed(grad_a, kFc2, grad_u, j);
      multiply_by(v, grad_a, slope, j);
      grad_z.template set<T>(j, v);
    }
    return grad_z;
  }

  // δm = W_1ᵀ·δz
  DECO_DEVICE Tile<D> run_fc1(const Operand<D>& grad_z) const {
    Tile<D> grad_m = zeros<D>();
#pragma unroll
    for (int j = 0; j < D / 8; ++j) add_transposed(grad_m.v[j], kFc1, grad_z, j);
    return grad_m;
  }

  // Returns δscale = δm·n;  δn = δm·scale
  DECO_DEVICE Operand<D> run_modulation(Tile<D>& grad_normalized, const Tile<D>& grad_m, const Tile<D>& normalized,
                                        const Operand<D>& scale) const {
    Operand<D> grad_scale;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = grad_m.v[j][i] * normalized.v[j][i];
      grad_scale.template set<T>(j, v);
      multiply_by(grad_normalized.v[j], grad_m.v[j], scale, j);
    }
    return grad_scale;
  }

  // δs += W_shiftᵀ·δshift + W_scaleᵀ·δscale + W_gateᵀ·δgate, summed over the chain of decoder blocks;
  // δcond = δs·SiLU'(cond) in the last step of the chain.
  DECO_DEVICE void run_cond(const Operand<D>& grad_shift, const Operand<D>& grad_scale,
                            const Operand<D>& grad_gate) const {
    Tile<D> grad_s = zeros<D>();
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      add_transposed(grad_s.v[j], kShift, grad_shift, j);
      add_transposed(grad_s.v[j], kScale, grad_scale, j);
      add_transposed(grad_s.v[j], kGate, grad_gate, j);
    }
    // region: wait_for_rows_of_cond
    if constexpr (Ahead) wait_for_copies<1>();
    // end region
    if (!p.first) {
      // region: gradient_of_later_blocks
      const Tile<D> before = load_rows(kInputGradS, p.grad_cond);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_s.v[j][i] += before.v[j][i];
      // end region
    }
    if (p.last) {
      // region: gradient_of_cond
      const Tile<D> cond = load_rows(kInputCond, p.cond);
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_s.v[j][i] *= 0.5f * silu_of_double_gradient(0.5f * cond.v[j][i]).slope;
      // end region
    }
    store_rows(p.grad_cond, grad_s);
  }

  // total += column tile j of W_matrixᵀ·grad
  DECO_DEVICE void add_transposed(float (&total)[4], BlockMatrix matrix, const Operand<D>& grad, int j) const {
    multiply_add<T, D>(total, grad, weight_columns<T, D>(w.matrix(matrix) + 8 * j));
  }

  // out = v times column tile j of an operand.
  static DECO_DEVICE void multiply_by(float (&out)[4], const float (&v)[4], const Operand<D>& operand, int j) {
    const uint32_t upper = operand.k_step[j / 2][2 * (j % 2)], lower = operand.k_step[j / 2][2 * (j % 2) + 1];
    out[0] = v[0] * low<T>(upper);
    out[1] = v[1] * high<T>(upper);
    out[2] = v[2] * low<T>(lower);
    out[3] = v[3] * high<T>(lower);
  }

  // ---- operands in shared memory ------------------------------------------------------------------------------------

  DECO_DEVICE void put(int which, const Operand<D>& operand) const {
    store_operand_tile<T, D>(operands + which * P::kTileElements, operand);
  }
  // Reads back an operand of `put`, to shorten the lifetime of its registers.
  DECO_DEVICE Operand<D> reload(int which) const {
    // region: barrier_before_reload
    warp_barrier();
    // end region
    return load_operand_tile<T, D>(operands + which * P::kTileElements);
  }

  // At D = 64, where registers do not suffice: stores an operand until `reload_spilled` in the slot of a later operand.
  DECO_DEVICE void spill(int which, const Operand<D>& operand) const {
    if constexpr (P::kFewRegisters) put(which, operand);
  }
  DECO_DEVICE Operand<D> reload_spilled(int which, const Operand<D>& operand) const {
    if constexpr (!P::kFewRegisters) return operand;
    const Operand<D> again = reload(which);
    warp_barrier();
    return again;
  }

  // ---- global memory ------------------------------------------------------------------------------------------------

  template <class AnyRows>
  DECO_DEVICE Tile<D> load_rows(Input input, const AnyRows& rows) const {
    if constexpr (Ahead) return tile_of<T>(inputs.row(input, 0), inputs.row(input, 1));
    return tile_of<T>(load_row<T, D>(rows, pixel[0]), load_row<T, D>(rows, pixel[1]));
  }
  DECO_DEVICE void store_rows(const RowsView& rows, const Tile<D>& values) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (valid[r]) store_row<T, D>(rows, pixel[r], row_of<T>(values, r));
  }

  DECO_DEVICE Operand<D> load_s() const {
    if constexpr (Ahead) return inputs.tile(kInputS);
    if constexpr (Tiled) return load_tile<D>(p.s_tiles, tile);
    return silu_operand<T>(load_row<T, D>(p.cond, pixel[0]), load_row<T, D>(p.cond, pixel[1]));
  }
  DECO_DEVICE Operand<D> load_h() const { return load_operand(kInputH, p.h_tiles, p.h); }
  // From a copy, operand tiles or rows.
  DECO_DEVICE Operand<D> load_operand(Input input, const void* tiles, const RowsView& rows) const {
    if constexpr (Ahead) return inputs.tile(input);
    if constexpr (Tiled) return load_tile<D>(tiles, tile);
    return operand_of(load_row<T, D>(rows, pixel[0]), load_row<T, D>(rows, pixel[1]));
  }

  // Rows of a gradient; zero for missing pixels, so that they add nothing to the sums.
  DECO_DEVICE Operand<D> load_gradient(const RowsView& rows) const {
    Operand<D> grad = load_operand(kInputGrad, p.grad_tiles, rows);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int i = r; i < 4; i += 2) grad.k_step[k][i] = valid[r] ? grad.k_step[k][i] : 0u;
    return grad;
  }
  DECO_DEVICE void store_gradient_of_h(const Tile<D>& grad_h) const {
    if constexpr (Tiled) {
      if (tile_exists) store_tile<D>(lane_words<D>(p.grad_tiles, tile), rounded<T>(grad_h));
    } else {
      store_rows(p.grad_h, grad_h);
    }
  }
};

template <class T, int D, bool Mlp, bool Tiled, bool Ahead>
DECO_KERNEL((Plan<D, Mlp>::kThreads), (Plan<D, Mlp>::kBlocksPerMultiprocessor), backward_kernel,
            const BackwardParams p) {
  using P = Plan<D, Mlp>;
  const BlockSlots<T, D, P::kMatrices> slots{shared_memory()};
  char* behind_weights = shared_memory() + slots.kBytes;
  const CopiedInputs<D> inputs{reinterpret_cast<Words4*>(behind_weights) + warp() * CopiedInputs<D>::kWords};
  auto* operands = reinterpret_cast<T*>(behind_weights + P::input_bytes(Ahead));
  const uint32_t turn_pixels = p.chain_warps * kTilePixels, step = block_count() * turn_pixels;
  wait_for_previous_kernel();
  slots.fill(0, p.packed, p.block);
  block_barrier();
  BlockWeights<T, D> weights = slots.first();
  if constexpr (!P::kFewRegisters) weights.selector = bias_selector_in_two_registers<T>();
  const bool sums = p.partials != nullptr;
  const uint32_t last_tile = (p.pixels - 1) / kTilePixels;

  // A chain warp.
  const auto start_chain = [&](uint32_t begin) {
    if constexpr (!Ahead) return;
    if (begin < p.pixels)
      Chain<T, D, Mlp, Tiled, Ahead>::copy_ahead(p, inputs, min(begin / kTilePixels + warp(), last_tile));
    commit_copies();
  };
  const auto run_chain = [&](uint32_t begin, int buffer) {
    const uint32_t tile = begin / kTilePixels + warp(), end = p.pixels - 1;
    const uint32_t first = tile * kTilePixels + (lane() >> 2);
    const Chain<T, D, Mlp, Tiled, Ahead> chain{p,
                                               weights,
                                               operands + (buffer * p.chain_warps + warp()) * P::kWarpElements,
                                               inputs,
                                               min(tile, last_tile),
                                               tile <= last_tile,
                                               {min(first, end), min(first + 8, end)},
                                               {first <= end, first + 8 <= end},
                                               min(tile + step / kTilePixels, last_tile),
                                               begin + step < p.pixels};
    chain.run();
  };

  // A gradient warp: δW += δoutput ⊗ input and δb += δoutput of one matrix, over the pixels of all chain warps.
  const int matrix = P::kSpecialized ? warp() - p.chain_warps : warp();
  MatrixGradient<T, D> gradient;
  const typename MatrixGradient<T, D>::Lane own(operands + (P::kOutputs + matrix) * P::kTileElements,
                                                operands + P::input_of(matrix) * P::kTileElements);
  const auto add_tiles = [&](int buffer) {
    const int first = buffer * p.chain_warps;
#pragma unroll 1
    for (int w = first; w < first + p.chain_warps; ++w) gradient.add(own, w * P::kWarpElements);
  };
  const auto write_gradient = [&] {
    constexpr int kNumbers = D * (D + 1);
    const int64_t place = (int64_t{block()} * p.depth + p.block) * P::kMatrices + matrix;
    gradient.write(p.partials + place * kNumbers, p.accumulate);
  };

  if constexpr (P::kSpecialized) {
    const int other = P::kOverlaps ? p.buffers - 1 : 0;  // the second buffer, or the only one
    int buffer = 0;
    if (warp() < p.chain_warps) {
      start_chain(block() * turn_pixels);
      for (uint32_t begin = block() * turn_pixels; begin < p.pixels; begin += step, buffer ^= other) {
        run_chain(begin, buffer);
        // region: chain_has_written
        block_barrier();
        // end region
        // region: chain_may_write
        if (other == 0) block_barrier();
        // end region
      }
    } else {
      gradient.clear();
      for (uint32_t begin = block() * turn_pixels; begin < p.pixels; begin += step, buffer ^= other) {
        // region: sums_may_read
        block_barrier();
        // end region
        if (sums) add_tiles(buffer);
        // region: sums_have_read
        if (other == 0) block_barrier();
        // end region
      }
      if (sums) write_gradient();
    }
  } else {
    const UniformWarp uniform_warp;
    gradient.clear();
    if (uniform_warp < p.chain_warps) start_chain(block() * turn_pixels);
    for (uint32_t begin = block() * turn_pixels; begin < p.pixels; begin += step) {
      if (uniform_warp < p.chain_warps) run_chain(begin, 0);
      if (sums) {
        // region: barrier_before_weight_gradients
        block_barrier();
        // end region
        add_tiles(0);
        block_barrier();
      }
    }
    if (sums) write_gradient();
  }
}

struct Schedule {
  int chain_warps, buffers;  // buffers: turns whose operands are in shared memory at once
  bool ahead;                // inputs are copied ahead
};

// As many chain warps as fit in the shared memory of a multiprocessor, which its thread blocks share, then two buffers
// if they fit, then copies of the inputs if they fit. The device takes kReservedBytes more for each thread block;
// limits.shared_bytes excludes those of one.
template <int D, bool Mlp>
Schedule schedule_of(const DeviceLimits& limits) {
  using P = Plan<D, Mlp>;
  constexpr int kReservedBytes = 1024;
  const auto fit = [&](int warps, int buffers, bool ahead) {
    const int bytes = P::kBlocksPerMultiprocessor * (P::shared_bytes(warps, buffers, ahead) + kReservedBytes);
    return bytes <= limits.shared_bytes + kReservedBytes;
  };
  int warps = P::kMostChainWarps;
  while (warps > 1 && !fit(warps, 1, false)) --warps;
  const int buffers = P::kOverlaps && fit(warps, 2, false) ? 2 : 1;
  return {warps, buffers, fit(warps, buffers, true)};
}

template <int D, bool Mlp>
int parts_of(const DeviceLimits& limits, int64_t pixels) {
  const int turn_pixels = schedule_of<D, Mlp>(limits).chain_warps * kTilePixels;
  return grid_blocks(pixels, turn_pixels, limits, Plan<D, Mlp>::kBlocksPerMultiprocessor);
}

template <class T, int D, bool Mlp, bool Tiled, bool Ahead>
Status run(const Call& call, BackwardParams p, const Schedule& schedule) {
  using P = Plan<D, Mlp>;
  p.chain_warps = schedule.chain_warps;
  p.buffers = schedule.buffers;
  p.parts = parts_of<D, Mlp>(call.limits, p.pixels);
  const int warps = P::kSpecialized ? p.chain_warps + P::kGradientWarps : P::kGradientWarps;
  return launch(Ahead ? "block_backward_ahead" : "block_backward", backward_kernel<T, D, Mlp, Tiled, Ahead>,
                {p.parts, 32 * warps, P::shared_bytes(p.chain_warps, p.buffers, Ahead), true}, call.stream, p);
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
  const BackwardParams p{op};
  return with_kernel(op.operand, op.width, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int D = width.value;
    if (!op.mlp) return run<T, D, false, false, false>(call, p, schedule_of<D, false>(call.limits));
    const Schedule schedule = schedule_of<D, true>(call.limits);
    if (op.h_tiles == nullptr) return run<T, D, true, false, false>(call, p, schedule);
    return schedule.ahead ? run<T, D, true, true, true>(call, p, schedule)
                          : run<T, D, true, true, false>(call, p, schedule);
  });
}

}  // namespace deco::cuda
