// Forward of upsample_modulate, one tile (upsample.h) at a time, with y = W_up token + b_up:
//
//   (shift, scale, gate) = W_mod SiLU(y) + b_mod
//   modulated = LayerNorm(h) (1 + scale) + shift
//
// Per pixel the kernel reads D values of h, writes 2 D (3 D with y), and takes D Z + 3 D^2 multiply-adds and D SiLUs: at
// D = 32, Z = 1152 in bfloat16, 192 bytes and 80 kFLOP. Deterministic: one thread computes each output in a fixed order,
// so the result does not depend on the number of threads.
#include "deco/upsample_modulate.h"

#include "cpu/kernel_table.h"
#include "cpu/modulation_tile.h"
#include "cpu/upsample.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int T = kTokenTile;

template <class Operand, int D>
void forward(const UpsampleModulateForward& call) {
  const DType activation = call.upsample.rows.dtype;
  Upsample<Operand, D> upsample(call.upsample, call.threads);
  BlockWeights<Operand> weights;
  ModulationTile<Operand, D, T>* scratch = nullptr;
  const auto lay_out = [&](Arena& arena) {
    upsample.lay_out(arena);
    weights = take_modulation_weights<Operand, D>(arena, call.weights, activation);
    scratch = arena.take<ModulationTile<Operand, D, T>>(upsample.parts());
  };
  with_scratch(lay_out);

  const int64_t pixels = call.upsample.tokens * call.upsample.pixels_per_token;
  const RowWrites modulated_writes = row_writes<D>(call.modulated, pixels);
  const RowWrites gate_writes = row_writes<D>(call.gate, pixels);
  upsample.for_each_tile([&](int part, const UpsampleTile<Operand>& place) {
    ModulationTile<Operand, D, T>& tile = scratch[part];
    const char* sources[T];
    tile_addresses(call.h, place, sources);
    upsample.load_silu_cond(place, tile.silu_cond,
                            [&](int step, int steps) { prefetch_rows<D>(activation, sources, step, steps); });
    load_rows<D, T>(activation, sources, place.pixels(), tile.h);
    modulate_tile(weights, call.eps, place.pixels(), tile);
    char* targets[T];
    tile_addresses(call.modulated, place, targets);
    store_rows<Operand, D, T>(activation, tile.modulated, place.count, targets, modulated_writes);
    tile_addresses(call.gate, place, targets);
    store_rows<Operand, D, T>(activation, tile.gate, place.count, targets, gate_writes);
  });
}

}  // namespace

void upsample_modulate_forward(const UpsampleModulateForward& call) {
  if (call.upsample.tokens == 0) return;
  with_operand_and_width(call.upsample.rows.dtype, call.upsample.width,
                         [&](auto operand, auto width) { forward<decltype(operand), width.value>(call); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
