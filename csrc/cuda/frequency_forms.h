// Frequency loss as quadratic forms, one for each of Y, Cb and Cr.
//
// With F the 64x64 matrix of the orthonormal 8x8 DCT, W the weights of a channel and x an 8x8 block of that channel,
//
//   sum of W·(F x)² = ⟨x, A x⟩,  A = Fᵀ·diag(W)·F,  and its gradient is 2·A x,
//
// so that one matmul gives the loss and its gradient. Because 2·cos a·cos b = cos(a - b) + cos(a + b), a 9x9 table
// gives the entry of A at pixels (y, x) and (y', x'); every thread block builds the forms in its shared memory:
//
//   A = U[y, y'][x-x'] + U[y, y'][x+x'+1]
//   U[y, y'][b] = T[y-y'][b] + T[y+y'+1][b]
//   T[a][b] = sum over u, v of W[u, v]·n_u·n_v·cos(π·u·a/8)·cos(π·v·b/8),  n_0 = 1/16, else 1/8; even, of period 16
//
// Precision: A = m·I + Q with m the mean of W. m stays float32; Q and x are split into bfloat16 high and low parts. The
// rows of a matmul's left operand are the eight 8x8 blocks of a group (loss_blocks.h): rows 0 to 7 are the high parts,
// rows 8 to 15 the low parts. Two matmuls, with the high and the low part of Q, give all four terms.
//
// The 64 pixels of an 8x8 block are permuted to slots so that a lane's accumulators belong to its own pixels: slot
// 32r + 8q + 2t + e is row t + 4r, column 2q + e.
#pragma once

#include "cuda/loss_blocks.h"

namespace deco::cuda {

constexpr int kSlots = kBlockSide * kBlockSide;

struct BlockPixel {
  int y, x;
};
DECO_DEVICE BlockPixel pixel_of_slot(int slot) {
  return {((slot >> 1) & 3) + 4 * (slot >> 5), 2 * ((slot >> 3) & 3) + (slot & 1)};
}

DECO_DEVICE int slot_of_pixel(int y, int x) { return 32 * (y >> 2) + 8 * (x >> 1) + 2 * (y & 3) + (x & 1); }

// The eight 8x8 blocks of a group as the left operand of a matmul over the 64 slots.
using BlockOperand = Operand<kSlots>;

// Sets slots 8j + 2t and 8j + 2t + 1 of the lane's 8x8 block.
DECO_DEVICE void set_slots(BlockOperand& x, int j, float first, float second) {
  const uint32_t rounded = pack<BFloat16>(first, second);
  x.k_step[j / 2][2 * (j % 2)] = rounded;
  x.k_step[j / 2][2 * (j % 2) + 1] = pack<BFloat16>(first - low<BFloat16>(rounded), second - high<BFloat16>(rounded));
}

// The lane's pixels of one color channel; `row` is its row of the color matrix.
DECO_DEVICE BlockOperand block_operand(const LanePixels& d, const Color& row) {
  BlockOperand x;
#pragma unroll
  for (int j = 0; j < kSlots / 8; ++j) {
    const int r = j / 4, i = 2 * (j % 4);
    set_slots(x, j, channel_value(d, row, r, i), channel_value(d, row, r, i + 1));
  }
  return x;
}

// 64x64 matrix [row][slot] in shared memory, split into bfloat16 high and low parts.
struct SplitMatrix {
  static constexpr int kElements = kSlots * kRowStride<kSlots>;
  static constexpr int kBytes = 2 * kElements * static_cast<int>(sizeof(BFloat16));

  BFloat16* high_part;

  // Writes the pair of entries at an even column.
  DECO_DEVICE void put(int row, int column, float first, float second) const {
    const uint32_t rounded = pack<BFloat16>(first, second);
    auto* place = reinterpret_cast<uint32_t*>(high_part + row * kRowStride<kSlots> + column);
    store(place, rounded);
    store(place + kElements / 2, pack<BFloat16>(first - low<BFloat16>(rounded), second - high<BFloat16>(rounded)));
  }

  // Rows 8j + 2t and 8j + 2t + 1 times the lane's 8x8 block.
  DECO_DEVICE void multiply_rows(float (&out)[2], const BlockOperand& x, int j) const {
    const BFloat16* rows = high_part + 8 * j * kRowStride<kSlots>;
    float total[4] = {0, 0, 0, 0};
    multiply_add<BFloat16>(total, x, weight_rows<BFloat16, kSlots>(lane_weights<BFloat16, kSlots>(rows)));
    multiply_add<BFloat16>(total, x, weight_rows<BFloat16, kSlots>(lane_weights<BFloat16, kSlots>(rows + kElements)));
    out[0] = total[0] + total[2];
    out[1] = total[1] + total[3];
  }
};

// cos(π·k/16) for any k >= 0, for tables that are built once.
DECO_DEVICE float cosine(int k) {
  k &= 31;
  if (k > 16) k = 32 - k;
  const int folded = k > 8 ? 16 - k : k;
  float value = 0.0f;
  if (folded == 0) value = 1.0f;
  if (folded == 1) value = 0.98078528f;
  if (folded == 2) value = 0.92387953f;
  if (folded == 3) value = 0.83146961f;
  if (folded == 4) value = 0.70710678f;
  if (folded == 5) value = 0.55557023f;
  if (folded == 6) value = 0.38268343f;
  if (folded == 7) value = 0.19509032f;
  return k > 8 ? -value : value;
}

class FrequencyForms {
  static constexpr int kTableSide = 9, kTable = kTableSide * kTableSide, kCosines = 16;
  static constexpr int kRowPairs = kSlots * kTableSide;  // entries of U of one channel

 public:
  static constexpr int kBytes =
      kColors * SplitMatrix::kBytes + 4 * (kColors * (kRowPairs + kTable + kSlots + 1) + kCosines);

  DECO_DEVICE explicit FrequencyForms(char* shared)
      : matrices_(shared),
        weights_(reinterpret_cast<float*>(shared + kColors * SplitMatrix::kBytes)),
        row_pairs_(weights_ + kColors * kSlots),
        table_(row_pairs_ + kColors * kRowPairs),
        means_(table_ + kColors * kTable),
        cosines_(means_ + kColors) {}

  // m of a channel.
  DECO_DEVICE float mean(int channel) const { return load(means_ + channel); }
  // Q of a channel.
  DECO_DEVICE SplitMatrix remainder(int channel) const {
    return {reinterpret_cast<BFloat16*>(matrices_ + channel * SplitMatrix::kBytes)};
  }

  // Builds the forms from weights [3, 8, 8]. Called by all threads of the thread block; ends with a barrier.
  DECO_DEVICE void build(const Array& frequency_weight) const {
    for (int i = thread(); i < kColors * kSlots; i += block_threads())
      store(weights_ + i, load_float(frequency_weight, i));
    if (thread() < kCosines) store(cosines_ + thread(), cosine(2 * thread()));
    block_barrier();
    for (int i = thread(); i < kColors * kTable; i += block_threads()) build_table(i);
    if (thread() < kColors) build_mean(thread());
    block_barrier();
    for (int i = thread(); i < kColors * kRowPairs; i += block_threads()) build_row_pair(i);
    block_barrier();
    for (int x = warp(); x < kBlockSide; x += block_threads() / 32) build_column(x);
    block_barrier();
  }

 private:
  // T is even with period 16: maps an index from 0 .. 16 to 0 .. 8.
  DECO_DEVICE static int folded(int i) { return min(i, 2 * kBlockSide - i); }
  DECO_DEVICE static int distance(int i, int j) { return i > j ? i - j : j - i; }

  // One entry of T.
  DECO_DEVICE void build_table(int index) const {
    const int channel = index / kTable, a = index / kTableSide % kTableSide, b = index % kTableSide;
    float across[kBlockSide];
#pragma unroll
    for (int v = 0; v < kBlockSide; ++v) across[v] = load(cosines_ + (v * b) % kCosines) * (v == 0 ? 0.0625f : 0.125f);
    float entry = 0.0f;
    for (int u = 0; u < kBlockSide; ++u) {
      float row = 0.0f;
#pragma unroll
      for (int v = 0; v < kBlockSide; ++v)
        row = fmaf(load(weights_ + channel * kSlots + u * kBlockSide + v), across[v], row);
      entry = fmaf(row, load(cosines_ + (u * a) % kCosines) * (u == 0 ? 0.0625f : 0.125f), entry);
    }
    store(table_ + index, entry);
  }

  // m of a channel.
  DECO_DEVICE void build_mean(int channel) const {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kSlots; k += 4) {
      const Float4 four = load(reinterpret_cast<const Float4*>(weights_ + channel * kSlots + k));
      total += (four.x + four.y) + (four.z + four.w);
    }
    store(means_ + channel, total * (1.0f / kSlots));
  }

  // One entry of U: [channel][y][y'][b].
  DECO_DEVICE void build_row_pair(int index) const {
    const int b = index % kTableSide, other_y = index / kTableSide % kBlockSide;
    const int y = index / (kTableSide * kBlockSide) % kBlockSide, channel = index / kRowPairs;
    const float* column = table_ + channel * kTable + b;
    store(row_pairs_ + index,
          load(column + distance(y, other_y) * kTableSide) + load(column + folded(y + other_y + 1) * kTableSide));
  }

  // Rows of Q of the pixels in column x, by one warp; a lane computes two adjacent columns of Q.
  DECO_DEVICE void build_column(int x) const {
    const int column = 2 * lane();
    const BlockPixel other = pixel_of_slot(column);
    const float* row_pairs = row_pairs_ + other.y * kTableSide;
    const float* near[2] = {row_pairs + distance(x, other.x), row_pairs + distance(x, other.x + 1)};
    const float* far[2] = {row_pairs + folded(x + other.x + 1), row_pairs + folded(x + other.x + 2)};
    for (int channel = 0; channel < kColors; ++channel) {
      const SplitMatrix matrix = remainder(channel);
      const float m = mean(channel);
#pragma unroll
      for (int y = 0; y < kBlockSide; ++y) {
        const int offset = (channel * kBlockSide + y) * kBlockSide * kTableSide;
        float entry[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          entry[e] = load(near[e] + offset) + load(far[e] + offset);
          if (y == other.y && x == other.x + e) entry[e] -= m;
        }
        matrix.put(slot_of_pixel(y, x), column, entry[0], entry[1]);
      }
    }
  }

  char* matrices_;
  float *weights_, *row_pairs_, *table_, *means_, *cosines_;
};

// The lane's share of a group's sums of d² inside the image, of m·x² and of x·Q x.
struct LaneSums {
  float pixel, scaled, remainder;
};

// Writes a group's sums of d² and of W·(F R M d)², from all lanes; `exists`: whether the lane's 8x8 block does.
DECO_DEVICE void write_group_sums(Float2* place, const LaneSums& own, bool exists) {
  const float pixel = warp_sum(exists ? own.pixel : 0.0f);
  const float scaled = warp_sum(exists ? own.scaled : 0.0f);
  const float remainder = warp_sum(exists ? own.remainder : 0.0f);
  // With an infinite difference every squared coefficient is infinite, but x·Q x is a difference of infinities: NaN.
  const bool infinite = scaled - scaled != 0.0f && scaled == scaled;
  if (lane() == 0) store(place, Float2{pixel, infinite ? scaled : scaled + remainder});
}

// Builds F, [frequency 8u + v][slot], for the gradient of the weights. Ends with a barrier.
DECO_DEVICE void build_dct(const SplitMatrix& dct) {
  constexpr int kPairs = kSlots / 2;
  for (int i = thread(); i < kSlots * kPairs; i += block_threads()) {
    const int frequency = i / kPairs, slot = 2 * (i % kPairs), u = frequency / kBlockSide, v = frequency % kBlockSide;
    const BlockPixel pixel = pixel_of_slot(slot);
    const float half = 0.5f, dc = 0.35355339f;  // sqrt(2/8) and sqrt(1/8)
    const float down = cosine((2 * pixel.y + 1) * u) * (u == 0 ? dc : half);
    const float norm = down * (v == 0 ? dc : half);
    dct.put(frequency, slot, norm * cosine((2 * pixel.x + 1) * v), norm * cosine((2 * pixel.x + 3) * v));
  }
  block_barrier();
}

}  // namespace deco::cuda
