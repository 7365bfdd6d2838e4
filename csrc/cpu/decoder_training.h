// Forward and backward of the decoder on tiles of T pixels, for parts (threads) that each sum the weights' gradients of
// their own tiles. Used by the backward of pixel_decoder and by pixel_decoder_loss.
#pragma once

#include "cpu/decoder_tile_backward.h"

namespace deco::cpu::DECO_CPU_ISA {

// Working memory of one part for one tile. Inputs: rgb, and grad_velocity before the backward. Results: normalized, the
// input of the head's matmul, after the forward; grad_rgb, block.grad_silu_cond for cond, and block.grad_h for the query,
// after the backward.
template <class Operand, int D, int T>
struct alignas(64) TrainingTile {
  BlockBackwardTile<Operand, D, T> block;
  float h[D][T], normalized[D][T], mean[T], rstd[T];
  float rgb[kMaxChannels][T], grad_rgb[kMaxChannels][T], grad_velocity[kMaxChannels][T];
  float panel[D][T];  // with a query
};

template <class Operand, int D, int T, class Order>
class DecoderTraining {
 public:
  DecoderTraining(const DecoderShape& shape, Order order, int parts) : shape_(shape), order_(order), parts_(parts) {}

  // Takes memory for weights, tiles and sums; the gradients with null data are not wanted.
  void lay_out(Arena& arena, const DecoderWeightArrays& weights, int head_norm, float eps, DType activation,
               bool wants_cond, const DecoderWeightArrays& grads) {
    const BlockWeightArrays& blocks = grads.blocks;
    wanted_ = {wants_cond, blocks.mod_weight.data || blocks.fc1_weight.data || blocks.fc2_weight.data};
    take_decoder_weights<Operand, D, T>(arena, weights, shape_, head_norm, eps, activation, order_, weights_);
    take_transposed_block_weights<Operand, D>(arena, weights.blocks, shape_.depth, activation, transposed_);
    tiles_ = arena.take<TrainingTile<Operand, D, T>>(parts_);
    saved_ = arena.take<SavedBlockTile<Operand, D, T>>(parts_ * shape_.depth);
    block_gradients_ = arena.take<BlockGradients<D>>(parts_ * shape_.depth);
    query_head_gradients_ = arena.take<QueryHeadGradients<D>>(parts_);
    grad_table_ = arena.take<float>(parts_ * table_size());
  }

  const DecoderWeights<Operand, T>& weights() const { return weights_; }
  TrainingTile<Operand, D, T>& tile(int part) { return tiles_[part]; }

  // Zeros the sums of a part.
  void clear(int part) {
    std::memset(&block_gradients_[part * shape_.depth], 0, shape_.depth * sizeof(BlockGradients<D>));
    std::memset(&query_head_gradients_[part], 0, sizeof(QueryHeadGradients<D>));
    std::memset(grad_table_ + part * table_size(), 0, table_size() * sizeof(float));
  }

  // From the tile's rgb, and its rows of cond and query, to its normalized; `panel` is that of the tile's pixels.
  // addresses(rows, pointers) sets the addresses of the tile's rows. Keeps the SavedBlockTile of each decoder block.
  template <class Addresses>
  void forward(int part, int panel, const PixelRows& cond, const PixelRows& query_rows, Addresses&& addresses,
               int pixels) {
    TrainingTile<Operand, D, T>& tile = tiles_[part];
    const char* rows[T];
    addresses(cond, rows);
    load_silu_cond<Operand, D, T>(cond.dtype, rows, pixels, tile.block.silu_cond, tile.block.silu_cond_derivative);
    const auto* sums =
        with_query<D, T>(query_rows, panel_of<const float>(weights_.table, panel), pixels, addresses, tile.panel);
    query<D, T>(weights_.channels, weights_.pixel_weight, sums, tile.rgb, pixels, tile.h);
    for (int n = 0; n < shape_.depth; ++n)
      forward_block<Operand, D, T>(weights_.blocks[n], weights_.eps, tile.block.silu_cond, pixels, tile.h,
                                   saved_[part * shape_.depth + n]);
    normalize<D, T>(weights_.rms_norm, tile.h, weights_.eps, pixels, tile.mean, tile.rstd, tile.normalized);
  }

  // From grad_velocity to grad_rgb and the gradients of cond and query; adds the weights' gradients to the part's sums.
  void backward(int part, int panel, int pixels) {
    TrainingTile<Operand, D, T>& tile = tiles_[part];
    head_backward<D, T>(weights_.channels, weights_.head_weight, tile.grad_velocity, tile.normalized, pixels,
                        tile.block.grad_normalized, query_head_gradients_[part]);
    const auto head_norm_backward =
        weights_.rms_norm ? norm_backward<false, false, D, T> : norm_backward<false, true, D, T>;
    head_norm_backward(tile.block.grad_normalized, tile.normalized, tile.rstd, pixels, tile.block.grad_h);
    start_backward(pixels, wanted_, tile.block);
    for (int n = shape_.depth - 1; n >= 0; --n) {
      const int index = part * shape_.depth + n;
      backward_block(weights_.blocks[n], transposed_[n], saved_[index], pixels, wanted_, tile.block,
                     block_gradients_[index]);
    }
    query_backward<D, T>(weights_.channels, weights_.pixel_weight, tile.rgb, tile.block.grad_h, pixels,
                         panel_of<float>(grad_table_ + part * table_size(), panel), tile.grad_rgb,
                         query_head_gradients_[part]);
    if (wanted_.cond) finish_grad_cond(pixels, tile.block);
  }

  // Adds the sums of all parts in order.
  void write_weight_gradients(const DecoderWeightArrays& grads) {
    const int depth = shape_.depth;
    for (int n = 0; n < depth; ++n)
      add_block_parts<D>(block_gradients_[n], depth * sizeof(BlockGradients<D>), parts_, n, grads.blocks);
    add_query_head_parts<D>(query_head_gradients_, shape_.channels, parts_, grads);
    add_table_parts<D, T>(grad_table_, weights_.panels, parts_, shape_.pixels_per_token(), order_, grads.pixel_table);
  }

 private:
  int64_t table_size() const { return int64_t{weights_.panels} * D * T; }

  template <class Float>
  static Float (*panel_of(Float* table, int panel))
      [T] { return reinterpret_cast<Float(*)[T]>(table + int64_t{panel} * D * T); }

  const DecoderShape& shape_;
  const Order order_;
  const int parts_;
  WantedGradients wanted_{};
  DecoderWeights<Operand, T> weights_;
  TransposedBlockWeights<Operand> transposed_[kMaxDepth];
  // One per part, or `depth` per part.
  TrainingTile<Operand, D, T>* tiles_ = nullptr;
  SavedBlockTile<Operand, D, T>* saved_ = nullptr;
  BlockGradients<D>* block_gradients_ = nullptr;
  QueryHeadGradients<D>* query_head_gradients_ = nullptr;
  float* grad_table_ = nullptr;  // [parts][panels][D][T]
};

}  // namespace deco::cpu::DECO_CPU_ISA
