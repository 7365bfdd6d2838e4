// Backward of pixel_decoder (decoder_tile_backward.h). The forward saves only its inputs: each tile recomputes its
// forward, stores the intermediate results in scratch memory, and runs through the decoder blocks in reverse order.
//
// Each part (thread) owns a contiguous share of the tiles. It writes the gradients of the image and cond at their
// pixels and adds the weights' gradients of its tiles, in order, to its own sums; the sums of the parts are added in
// order at the end. Bitwise reproducible for a given number of threads. Scratch memory per thread at D = 32, N = 3:
// about 0.4 MB. Per pixel: 15 N D^2 multiply-adds, 5 N D^2 of them for the recomputed forward.
#include "cpu/decoder_tile_backward.h"
#include "cpu/kernel_table.h"
#include "cpu/rows.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

// Working memory of one part.
template <class Operand, int D, int T>
struct alignas(64) PartScratch {
  BlockBackwardTile<Operand, D, T> block;
  float h[D][T], normalized[D][T], mean[T], rstd[T];
  float rgb[kMaxChannels][T], grad_rgb[kMaxChannels][T], grad_velocity[kMaxChannels][T];
};

template <class Operand, int D, int T>
class Backward {
 public:
  explicit Backward(const PixelDecoderBackward& call)
      : call_(call),
        rows_(call.shape.pixels()),
        tiles_((rows_ + T - 1) / T),
        parts_(part_count(tiles_, call.threads)),
        depth_(call.shape.depth) {
    const DecoderWeightArrays& grads = call.grad_weights;
    wanted_.cond = call.grad_cond.data != nullptr;
    wanted_.matrices = grads.blocks.mod_weight.data || grads.blocks.fc1_weight.data || grads.blocks.fc2_weight.data;
  }

  void run() {
    Arena counter;
    lay_out(counter);
    Arena arena(thread_scratch(counter.used()));
    lay_out(arena);
    parallel_for(parts_, [&](int part) { run_part(part); });
    for (int n = 0; n < depth_; ++n)
      add_block_parts<D>(block_gradients_[n], depth_ * sizeof(BlockGradients<D>), parts_, n, call_.grad_weights.blocks);
    add_query_head_parts<D>(query_head_gradients_, call_.shape.channels, parts_, call_.grad_weights);
    add_table_parts<D, T>(grad_table_, weights_.panels, parts_, call_.shape.pixels_per_token(),
                          call_.grad_weights.pixel_table);
  }

 private:
  void lay_out(Arena& arena) {
    const DType activation = call_.cond.dtype;
    take_decoder_weights<Operand, D, T>(arena, call_.weights, call_.shape, call_.eps, activation, weights_);
    take_transposed_block_weights<Operand, D>(arena, call_.weights.blocks, depth_, activation, transposed_);
    scratch_ = arena.take<PartScratch<Operand, D, T>>(parts_);
    saved_ = arena.take<SavedBlockTile<Operand, D, T>>(parts_ * depth_);
    block_gradients_ = arena.take<BlockGradients<D>>(parts_ * depth_);
    query_head_gradients_ = arena.take<QueryHeadGradients<D>>(parts_);
    grad_table_ = arena.take<float>(parts_ * table_size());
  }

  int64_t table_size() const { return int64_t{weights_.panels} * D * T; }

  void run_part(int part) {
    std::memset(&block_gradients_[part * depth_], 0, depth_ * sizeof(BlockGradients<D>));
    std::memset(&query_head_gradients_[part], 0, sizeof(QueryHeadGradients<D>));
    std::memset(grad_table_ + part * table_size(), 0, table_size() * sizeof(float));
    const Range share = share_of(tiles_, parts_, part);
    for (int64_t t = share.begin; t < share.end; ++t) {
      const int64_t first = t * T;
      const int count = static_cast<int>(rows_ - first < T ? rows_ - first : T);
      const int64_t panel = t % weights_.panels * D * T;
      forward(part, first, count, reinterpret_cast<const float (*)[T]>(weights_.table + panel));
      backward(part, first, count, reinterpret_cast<float (*)[T]>(grad_table_ + part * table_size() + panel));
    }
  }

  // Stores the tile's inputs, the SavedBlockTile of each decoder block and the head's normalized input in scratch.
  void forward(int part, int64_t first, int count, const float (*panel)[T]) {
    PartScratch<Operand, D, T>& scratch = scratch_[part];
    SavedBlockTile<Operand, D, T>* saved = saved_ + part * depth_;
    const int pixels = whole_strips(count);
    const char* rows[T];
    row_addresses<T, const char*>(call_.shape, call_.cond, first, count, kZeroRow, rows);
    load_silu_cond<Operand, D, T>(call_.cond.dtype, rows, pixels, scratch.block.silu_cond,
                                  scratch.block.silu_cond_derivative);
    gather_pixels<T>(call_.shape, call_.image, first, count, scratch.rgb);
    query<D, T>(weights_.channels, weights_.pixel_weight, panel, scratch.rgb, pixels, scratch.h);
    for (int n = 0; n < depth_; ++n)
      forward_block<Operand, D, T>(weights_.blocks[n], weights_.eps, scratch.block.silu_cond, pixels, scratch.h,
                                   saved[n]);
    normalize<D, T>(scratch.h, weights_.eps, pixels, scratch.mean, scratch.rstd, scratch.normalized);
  }

  void backward(int part, int64_t first, int count, float (*grad_panel)[T]) {
    PartScratch<Operand, D, T>& scratch = scratch_[part];
    const int pixels = whole_strips(count);
    gather_pixels<T>(call_.shape, call_.grad_velocity, first, count, scratch.grad_velocity);
    head_backward<D, T>(weights_.channels, weights_.head_weight, scratch.grad_velocity, scratch.normalized, pixels,
                        scratch.block.grad_normalized, query_head_gradients_[part]);
    layer_norm_backward<false, D, T>(scratch.block.grad_normalized, scratch.normalized, scratch.rstd, pixels,
                                     scratch.block.grad_h);
    start_backward(pixels, wanted_, scratch.block);
    for (int n = depth_ - 1; n >= 0; --n)
      backward_block(weights_.blocks[n], transposed_[n], saved_[part * depth_ + n], pixels, wanted_, scratch.block,
                     block_gradients_[part * depth_ + n]);
    query_backward<D, T>(weights_.channels, weights_.pixel_weight, scratch.rgb, scratch.block.grad_h, pixels,
                         grad_panel, scratch.grad_rgb, query_head_gradients_[part]);
    if (call_.grad_image.data != nullptr)
      scatter_pixels<T>(call_.shape, call_.grad_image, first, count, scratch.grad_rgb);
    if (wanted_.cond) {
      finish_grad_cond(pixels, scratch.block);
      char* rows[T];
      row_addresses<T, char*>(call_.shape, call_.grad_cond, first, count, nullptr, rows);
      store_rows<FloatOperand, D, T>(call_.grad_cond.dtype, scratch.block.grad_silu_cond, count, rows,
                                     row_writes<D>(call_.grad_cond, rows_));
    }
  }

  const PixelDecoderBackward& call_;
  const int64_t rows_, tiles_;
  const int parts_, depth_;
  WantedGradients wanted_{};
  DecoderWeights<Operand, T> weights_;
  TransposedBlockWeights<Operand> transposed_[kMaxDepth];
  // One per part, or `depth` per part.
  PartScratch<Operand, D, T>* scratch_ = nullptr;
  SavedBlockTile<Operand, D, T>* saved_ = nullptr;
  BlockGradients<D>* block_gradients_ = nullptr;
  QueryHeadGradients<D>* query_head_gradients_ = nullptr;
  float* grad_table_ = nullptr;  // [parts][panels][D][T]
};

}  // namespace

void pixel_decoder_backward(const PixelDecoderBackward& call) {
  with_operand_and_width(call.cond.dtype, call.shape.decoder_width, [&](auto operand, auto width) {
    constexpr int kTile = width < 64 ? 64 : 32;  // limits the scratch memory of a tile at D = 64, N = 8
    Backward<decltype(operand), width.value, kTile>(call).run();
  });
}

}  // namespace deco::cpu::DECO_CPU_ISA
