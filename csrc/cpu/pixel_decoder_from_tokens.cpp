// Forward of pixel_decoder_from_tokens: the upsample matmul (upsample.h) and the whole per-pixel decoder
// (decoder_tile.h), one tile of upsample.h at a time; cond is written to memory only if the caller wants it. A query
// made from tokens is the result of a second upsample of the same tile, and is never written.
//
// Per pixel the kernel reads C values of the image, writes C of the velocity, and takes D Z + N (5 D^2) + 2 C D
// multiply-adds (with query tokens D Zq more) and (N + 1) D SiLUs: at D = 32, N = 3, C = 3, Z = 1152 in bfloat16 with a
// float image and no query, 18 bytes and 105 kFLOP. Deterministic: one thread computes each output in a fixed order, so
// the result does not depend on the number of threads.
#include "deco/pixel_decoder_from_tokens.h"

#include "cpu/decoder_tile.h"
#include "cpu/kernel_table.h"
#include "cpu/upsample.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int T = kTokenTile;

// The row of pixel_table of the tile's pixel, repeated T times.
template <class Operand, int D>
void fill_panel(const DecoderWeights<Operand, T>& weights, int pixel, float (*panel)[T]) {
  const float* table = weights.table + pixel / T * D * T + pixel % T;
  for (int d = 0; d < D; ++d)
    for (int i = 0; i < T; i += kLanes) store(&panel[d][i], broadcast(table[d * T]));
}

template <class Operand, int D>
void forward(const PixelDecoderFromTokensForward& call) {
  Upsample<Operand, D> upsample(call.upsample, call.threads), query(call.query_upsample, call.threads);
  const bool query_from_tokens = call.query_upsample.tokens > 0;
  DecoderWeights<Operand, T> weights;
  DecoderTile<Operand, D, T>* scratch = nullptr;
  const auto lay_out = [&](Arena& arena) {
    upsample.lay_out(arena);
    if (query_from_tokens) query.lay_out(arena);
    take_decoder_weights<Operand, D, T>(arena, call.weights, call.shape, call.head_norm, call.eps,
                                        call.upsample.rows.dtype, weights);
    scratch = arena.take<DecoderTile<Operand, D, T>>(upsample.parts());
  };
  with_scratch(lay_out);

  const auto decode = [&](int part, const UpsampleTile<Operand>& place) {
    DecoderTile<Operand, D, T>& tile = scratch[part];
    upsample.load_silu_cond(place, tile.silu_cond, [](int, int) {});
    gather_token_pixels<T>(call.shape, call.image, place.first_token, place.pixel, place.count, tile.rgb);
    fill_panel<Operand, D>(weights, place.pixel, tile.panel);
    if (query_from_tokens) query.add_to(query.matching_tile(part, place), tile.panel);
    if (call.query.data != nullptr) {
      const char* rows[T];
      tile_addresses(call.query, place, rows);
      add_rows<D, T>(call.query.dtype, rows, place.pixels(), tile.panel);
    }
    forward_tile<Operand, D, T>(weights, tile.panel, place.pixels(), tile);
    scatter_token_pixels<T>(call.shape, call.velocity, place.first_token, place.pixel, place.count, tile.velocity);
  };
  upsample.for_each_tile(decode, query_from_tokens ? &query : nullptr);
}

}  // namespace

void pixel_decoder_from_tokens_forward(const PixelDecoderFromTokensForward& call) {
  if (call.shape.pixels() == 0) return;
  with_operand_and_width(call.upsample.rows.dtype, call.shape.decoder_width,
                         [&](auto operand, auto width) { forward<decltype(operand), width.value>(call); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
