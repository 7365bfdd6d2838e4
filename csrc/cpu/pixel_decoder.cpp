// Forward of pixel_decoder: the whole per-pixel decoder (decoder_tile.h), one tile of T consecutive rows of cond at a
// time.
//
// Tiles are scheduled dynamically among the parts (threads). Per pixel the kernel reads D values of cond and C of the
// image, writes C of the velocity, and takes N (5 D^2) + 2 C D multiply-adds and (N + 1) D SiLUs: at D = 32, N = 3,
// C = 3 in bfloat16 with a float image, 82 bytes and 31 kFLOP. Deterministic: one thread computes each output in a
// fixed order, so the result does not depend on the number of threads or the schedule.
#include "cpu/decoder_tile.h"
#include "cpu/kernel_table.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int kTile = 64;

template <class Operand, int D>
void forward(const PixelDecoderForward& call) {
  constexpr int T = kTile;
  const int64_t rows = call.shape.pixels(), tiles = (rows + T - 1) / T;
  const int parts = part_count(tiles, call.threads);

  DecoderWeights<Operand, T> weights;
  DecoderTile<Operand, D, T>* scratch = nullptr;
  const auto lay_out = [&](Arena& arena) {
    take_decoder_weights<Operand, D, T>(arena, call.weights, call.shape, call.head_norm, call.eps, call.cond.dtype,
                                        weights);
    scratch = arena.take<DecoderTile<Operand, D, T>>(parts);
  };
  with_scratch(lay_out);

  SharedWork work(tiles, parts);
  parallel_matmuls<Operand, D>(parts, [&](int part) {
    DecoderTile<Operand, D, T>& tile = scratch[part];
    work.for_each_share([&](Range share) {
      for (int64_t t = share.begin; t < share.end; ++t) {
        const int64_t first = t * T;
        const int count = static_cast<int>(rows - first < T ? rows - first : T);
        const int pixels = whole_strips(count);
        prefetch_rows<D, T>(call.shape, call.cond, first + T);
        if (call.query.data != nullptr) prefetch_rows<D, T>(call.shape, call.query, first + T);
        const auto addresses = [&](const PixelRows& rows, const char*(&pointers)[T]) {
          row_addresses<T, const char*>(call.shape, rows, first, count, pointers);
        };
        const char* rows_of_cond[T];
        addresses(call.cond, rows_of_cond);
        load_silu_cond<Operand, D, T>(call.cond.dtype, rows_of_cond, pixels, tile.silu_cond);
        gather_pixels<T>(call.shape, call.image, first, count, tile.rgb);
        const auto* table = reinterpret_cast<const float (*)[T]>(weights.table + t % weights.panels * D * T);
        const auto* panel = with_query<D, T>(call.query, table, pixels, addresses, tile.panel);
        forward_tile<Operand, D, T>(weights, panel, pixels, tile);
        scatter_pixels<T>(call.shape, call.velocity, first, count, tile.velocity);
      }
    });
  });
}

}  // namespace

void pixel_decoder_forward(const PixelDecoderForward& call) {
  if (call.shape.pixels() == 0) return;
  with_operand_and_width(call.cond.dtype, call.shape.decoder_width,
                         [&](auto operand, auto width) { forward<decltype(operand), width.value>(call); });
}

}  // namespace deco::cpu::DECO_CPU_ISA
