// Gradients of the upsample y = W_up token + b_up (upsample.h) from dy, with R = P D outputs per token:
//
//   dtoken[t] = sum over r of dy[t][r] W_up[r]        a sum over the outputs
//   dW_up[r] = sum over t of dy[t][r] token[t]        a sum over the tokens
//   db_up[r] = sum over t of dy[t][r]
//
// Both matmuls have Z in the vector lanes (with AMX, the columns of tiles) and broadcast dy; their second factor is
// packed in strips of kStrip columns, [elements][kStrip], where an element (matmul.h) is a value, or a pair along the
// sum. Sums beyond their end are padded with zeros to whole groups of kLanes elements.
//
// Each takes T R Z multiply-adds. Memory traffic: dW_up is written once (with `adds`, read too), W_up is read once per
// part of the tokens, on few threads one, in the dtype in which it is stored. Deterministic: every result is one sum in
// a fixed order, independent of the number of threads.
#include "cpu/kernel_table.h"
#include "cpu/panel.h"
#include "cpu/upsample.h"

namespace deco::cpu::DECO_CPU_ISA {
namespace {

constexpr int kWidth = 32;              // sums are long enough for tiles of any width
constexpr int kBlock = 128;             // elements of the sum over the outputs that are packed at a time
constexpr int kPanelRows = 8 * kGroup;  // rows of dW_up whose dy is packed at a time
constexpr int kPackingGroups = 4;       // groups of tokens whose sums take about as long as packing a strip of weights

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

const char* address(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.stride + column) * size_of(rows.dtype);
}

// kLanes elements of two adjacent rows (one, if an element is a single value) from column `column` on.
template <class Operand, DType kStorage>
DECO_INLINE typename Operand::Vector interleaved(const char* first, const char* second, int64_t column,
                                                 DType rounding) {
  const VecF values = load_as<kStorage>(first, column);
  if constexpr (Operand::kPack == 1) {
    return round_vector(rounding, values);
  } else {
    return make_pairs(values, load_as<kStorage>(second, column));
  }
}

// Factor of a sum over rows: to[e] = elements of rows e kPack .. of `count` rows, `columns` <= kStrip columns of each.
// Places beyond the rows and columns are 0.
template <class Operand>
void pack_strip(const Rows& from, int64_t first, int64_t count, int64_t column, int64_t columns, DType rounding,
                int64_t elements, typename Operand::Element (*to)[kStrip]) {
  constexpr int kPack = Operand::kPack;
  with_dtype(from.dtype, [&](auto storage) {
    constexpr int64_t kBytes = size_of(storage.value);
    alignas(64) char ends[kPack][kStrip * kBytes] = {}, zeros[kStrip * kBytes] = {};
    for (int64_t e = 0; e < elements; ++e) {
      const char* rows[kPack];
      unroll<kPack>([&](auto i) DECO_INLINE_LAMBDA {
        const int64_t row = e * kPack + i;
        rows[i] = row < count ? address(from, first + row, column) : zeros;
        if (row < count && columns < kStrip) {
          std::memcpy(ends[i], rows[i], columns * kBytes);
          rows[i] = ends[i];
        }
      });
      unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
        Operand::store_vector(&to[e][v * kLanes],
                              interleaved<Operand, storage.value>(rows[0], rows[kPack - 1], v * kLanes, rounding));
      });
    }
  });
}

template <class Operand>
class Backward {
 public:
  using Element = typename Operand::Element;
  using Strip = Element (*)[kStrip];
  using RowPanel = Panel<Operand, kWidth>;

  explicit Backward(const UpsampleBackward& call)
      : call_(call),
        strips_(divided(call.token_width, kStrip)),
        elements_(whole_elements(call.tokens)),
        streams_weight_(!call.adds && call.grad_weight.dtype == DType::kFloat32 &&
                        row_writes<kStrip>(DType::kFloat32, call.grad_weight.data, call.outputs * strips_,
                                           call.token_width) == RowWrites::kStreamed) {}

  // dtoken, in parts of the strips and of the tokens.
  void token_gradient() {
    const int64_t groups = divided(call_.tokens, kTokens);
    const Division cut = division(groups);
    const int parts = cut.tokens * cut.strips;
    const auto work_of = [&](int part) {
      return TokenWork{share_of(groups, cut.tokens, part / cut.strips),
                       share_of(strips_, cut.strips, part % cut.strips)};
    };
    Element *rows = nullptr, *strip = nullptr;
    float* sums = nullptr;
    const int64_t most_groups = divided(groups, cut.tokens), most_strips = divided(strips_, cut.strips);
    const int64_t rows_size = most_groups * kTokens * kBlock, sums_size = most_groups * most_strips * kTokens * kStrip;
    with_scratch([&](Arena& arena) {
      rows = arena.take<Element>(parts * rows_size);
      strip = arena.take<Element>(int64_t{parts} * kBlock * kStrip);
      sums = arena.take<float>(parts * sums_size);
    });
    parallel_matmuls<Operand, kWidth>(parts, [&](int part) {
      add_tokens(work_of(part), rows + part * rows_size,
                 reinterpret_cast<Strip>(strip + int64_t{part} * kBlock * kStrip), sums + part * sums_size);
    });
  }

  // dW_up and db_up. Items: a strip of a panel of rows; db_up belongs to the first strip.
  void weight_gradient() {
    const int64_t panels = divided(call_.outputs, kPanelRows);
    const bool bias_alone = call_.grad_weight.data == nullptr;
    const int64_t panel_strips = bias_alone ? 1 : strips_;
    const int parts = part_count(panels * panel_strips, call_.threads);
    const int64_t panel_size = kPanelRows * elements_;
    Element *tokens = nullptr, *panels_of_parts = nullptr;
    with_scratch([&](Arena& arena) {
      tokens = arena.take<Element>(bias_alone ? 0 : strips_ * elements_ * kStrip);
      panels_of_parts = arena.take<Element>(parts * panel_size);
    });
    parallel_for(parts, [&](int part) {
      const Range share = share_of(bias_alone ? 0 : strips_, parts, part);
      for (int64_t s = share.begin; s < share.end; ++s)
        pack_strip<Operand>(call_.rows, 0, call_.tokens, s * kStrip, columns_of(s), DType::kFloat32, elements_,
                            strip_at(tokens, s));
    });
    SharedWork work(panels * panel_strips, parts);
    parallel_matmuls<Operand, kWidth>(parts, [&](int part) {
      const RowPanel panel = {panels_of_parts + part * panel_size, elements_};
      int64_t packed = -1;
      work.for_each_share([&](Range share) {
        for (int64_t item = share.begin; item < share.end; ++item) {
          const int64_t index = item / panel_strips, s = item % panel_strips;
          if (index != packed || s == 0) pack_panel(index, s == 0, panel);
          packed = index;
          if (!bias_alone) add_strip(index, s, panel, strip_at(tokens, s));
        }
      });
    });
  }

 private:
  static constexpr int kTokens = kUsesTiles<Operand> ? kStrip : kGroup;  // in a group of tokens

  struct TokenWork {
    Range groups, strips;
  };

  static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t whole_elements(int64_t rows) { return divided(rows, kLanes * Operand::kPack) * kLanes; }

  int64_t columns_of(int64_t strip) const { return at_most(kStrip, call_.token_width - strip * kStrip); }
  Strip strip_at(Element* tokens, int64_t s) const { return reinterpret_cast<Strip>(tokens + s * elements_ * kStrip); }

  // ---- dtoken: sums over the outputs, block by block -----------------------------------------------------------------

  // Numbers of parts of the tokens and of the strips.
  struct Division {
    int tokens, strips;
  };

  // At most one part per thread, so that the largest part takes the least time; each packs its strips of weights.
  Division division(int64_t groups) const {
    Division best{};
    int64_t least = 0;
    for (int tokens = 1; tokens <= part_count(groups, call_.threads); ++tokens) {
      const int strips = part_count(strips_, call_.threads / tokens);
      const int64_t time = divided(strips_, strips) * (divided(groups, tokens) + kPackingGroups);
      if (tokens > 1 && time >= least) continue;
      best = {tokens, strips};
      least = time;
    }
    return best;
  }

  // rows: [group][kTokens][kBlock]. sums: [strip][group], kept between the blocks.
  void add_tokens(const TokenWork& work, Element* rows, Strip strip, float* sums) const {
    constexpr int64_t kValues = kBlock * Operand::kPack;
    for (int64_t first = 0; first < call_.outputs; first += kValues) {
      const int64_t count = at_most(kValues, call_.outputs - first);
      pack_rows(work.groups, first, count, rows);
      float* of_group = sums;
      for (int64_t s = work.strips.begin; s < work.strips.end; ++s) {
        pack_strip<Operand>(weight_rows(), first, count, s * kStrip, columns_of(s), call_.rows.dtype,
                            whole_elements(count), strip);
        const Ahead ahead = ahead_of(work, first, count, s);
        for (int64_t g = work.groups.begin; g < work.groups.end; ++g, of_group += kTokens * kStrip) {
          prefetch(ahead, g - work.groups.begin, work.groups.end - work.groups.begin);
          const Element* row = rows + (g - work.groups.begin) * kTokens * kBlock;
          add_group(row, strip, whole_elements(count), first > 0, of_group);
        }
      }
    }
    put_tokens(work, sums);
  }

  // sums [kTokens][kStrip] = [sums +] rows [kTokens][kBlock] x strip, over `elements`.
  static void add_group(const Element* rows, Strip strip, int64_t elements, bool adds, float* sums) {
#if DECO_HAVE_AMX
    if constexpr (kUsesTiles<Operand>)
      return tile_block<kTilePairs<kWidth>, 2, 2>(elements, {rows, kBlock}, {strip[0], kStrip}, {sums, kStrip}, adds,
                                                  [] {});
#endif
    GroupSums found;
    unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA { found[i] = adds ? load(sums + i * kLanes) : broadcast(0.0f); });
    for (int64_t e = 0; e < elements; e += kLanes)
      multiply_add<Operand, kLanes, kBlock, 1, kStrip>(found, rows + e, rows + kGroup / 2 * kBlock + e, strip + e);
    unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA { store(sums + i * kLanes, found[i]); });
  }

  // Rows of weights that are packed next, at one column.
  struct Ahead {
    int64_t first, count, column;
  };

  Ahead ahead_of(const TokenWork& work, int64_t first, int64_t count, int64_t strip) const {
    if (strip + 1 < work.strips.end) return {first, count, (strip + 1) * kStrip};
    const int64_t left = call_.outputs - first - count;
    return {first + count, at_most(left, count), work.strips.begin * kStrip};
  }

  // Prefetches share `step` of `steps` into the L2 cache.
  DECO_INLINE void prefetch(const Ahead& ahead, int64_t step, int64_t steps) const {
    const Rows rows = weight_rows();
    for (int64_t row = ahead.count * step / steps; row < ahead.count * (step + 1) / steps; ++row) {
      const char* line = address(rows, ahead.first + row, ahead.column);
      for (int64_t byte = 0; byte < kStrip * size_of(rows.dtype); byte += kCacheLine)
        __builtin_prefetch(line + byte, 0, 2);
    }
  }

  Rows weight_rows() const { return {call_.weight.data, call_.weight.dtype, call_.token_width}; }

  // to[token] = outputs first .. first + count - 1 of dy; 0 beyond the tokens, and to a whole number of elements.
  void pack_rows(Range groups, int64_t first, int64_t count, Element* to) const {
    constexpr int64_t kValues = kLanes * Operand::kPack;
    with_dtype(call_.grad_cond.dtype, [&](auto storage) {
      for (int64_t token = groups.begin * kTokens; token < groups.end * kTokens; ++token, to += kBlock) {
        const char* row = address(call_.grad_cond, at_most(token, call_.tokens - 1), first);
        for (int64_t value = 0; value < count; value += kValues) {
          alignas(64) char end[kValues * size_of(storage.value)] = {};
          const bool whole = value + kValues <= count;
          if (!whole) std::memcpy(end, row + value * size_of(storage.value), (count - value) * size_of(storage.value));
          const void* from = whole ? row + value * size_of(storage.value) : end;
          Operand::store_vector(to + value / Operand::kPack,
                                load_elements<Operand, storage.value>(from, 0, DType::kFloat32));
        }
      }
    });
  }

  void put_tokens(const TokenWork& work, const float* sums) const {
    const Array& to = call_.grad_tokens;
    for (int64_t s = work.strips.begin; s < work.strips.end; ++s)
      for (int64_t row = work.groups.begin * kTokens; row < work.groups.end * kTokens; ++row, sums += kStrip) {
        if (row >= call_.tokens) continue;
        const int64_t first = row * call_.token_width + s * kStrip, columns = columns_of(s);
        if (columns == kStrip) {
          with_dtype(to.dtype, [&](auto storage) {
            unroll<2>([&](auto v) DECO_INLINE_LAMBDA {
              store_as<storage.value>(to.data, first + v * kLanes, load(sums + v * kLanes));
            });
          });
        } else {
          for (int64_t c = 0; c < columns; ++c) store_scalar(to.data, to.dtype, first + c, sums[c]);
        }
      }
  }

  // ---- dW_up and db_up: sums over the tokens -------------------------------------------------------------------------

  int64_t panel_rows(int64_t index) const { return at_most(kPanelRows, call_.outputs - index * kPanelRows); }

  // dW_up on a strip of panel `index`.
  void add_strip(int64_t index, int64_t s, const RowPanel& panel, Strip strip) const {
    const auto start = [](GroupSums& sums, int64_t) DECO_INLINE_LAMBDA { clear_sums(sums); };
    const auto before_step = []() DECO_INLINE_LAMBDA {};
    panel.multiply(panel_rows(index), strip, start, before_step,
                   [&](const GroupSums& sums, int64_t row)
                       DECO_INLINE_LAMBDA { put_weight(index * kPanelRows + row, s, sums); });
  }

  // panel: dy of the rows. Writes db_up if `sums_bias`.
  void pack_panel(int64_t index, bool sums_bias, const RowPanel& panel) const {
    constexpr int kPack = Operand::kPack;
    alignas(64) float totals[kPanelRows] = {};
    alignas(64) const char zeros[kPanelRows * sizeof(float)] = {};
    const int64_t first = index * kPanelRows, rows = panel_rows(index);
    with_dtype(call_.grad_cond.dtype, [&](auto storage) {
      for (int64_t e = 0; e < elements_; e += kLanes) {
        const char* tokens[kLanes * kPack];
        unroll<kLanes * kPack>([&](auto i) DECO_INLINE_LAMBDA {
          const int64_t token = e * kPack + i;
          tokens[i] = token < call_.tokens ? address(call_.grad_cond, token, first) : zeros;
        });
        for (int64_t r = 0; r < rows; r += kLanes) {
          for (const char* token : tokens) accumulate(totals + r, load_as<storage.value>(token, r));
          typename Operand::Vector square[kLanes];
          unroll<kLanes>([&](auto i) DECO_INLINE_LAMBDA {
            const char *low = tokens[i * kPack], *high = tokens[i * kPack + kPack - 1];
            square[i] = interleaved<Operand, storage.value>(low, high, r, DType::kFloat32);
          });
          panel.put_columns(r, e, square);
        }
      }
    });
    if (call_.grad_bias.data == nullptr || !sums_bias) return;
    for (int64_t r = 0; r < rows; ++r) put(call_.grad_bias, first + r, totals[r]);
  }

  void put(const Array& to, int64_t index, float value) const {
    store_scalar(to.data, to.dtype, index, call_.adds ? load_scalar(to.data, to.dtype, index) + value : value);
  }

  void put_weight(int64_t row, int64_t strip, const GroupSums& sums) const {
    const Array& to = call_.grad_weight;
    const int64_t first = row * call_.token_width + strip * kStrip;
    if (columns_of(strip) < kStrip) {
      alignas(64) float values[kGroup][kStrip];
      unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA { store(&values[i / 2][i % 2 * kLanes], sums[i]); });
      for (int o = 0; o < kGroup; ++o)
        for (int64_t c = 0; c < columns_of(strip); ++c) put(to, first + o * call_.token_width + c, values[o][c]);
      return;
    }
    if (streams_weight_) {
      float* data = static_cast<float*>(to.data) + first;
      unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA {
        store_streaming(data + i / 2 * call_.token_width + i % 2 * kLanes, sums[i]);
      });
      return;
    }
    with_dtype(to.dtype, [&](auto storage) {
      unroll<2 * kGroup>([&](auto i) DECO_INLINE_LAMBDA {
        const int64_t index = first + i / 2 * call_.token_width + i % 2 * kLanes;
        store_as<storage.value>(to.data, index,
                                call_.adds ? load_as<storage.value>(to.data, index) + sums[i] : sums[i]);
      });
    });
  }

  const UpsampleBackward& call_;
  const int64_t strips_;       // of Z
  const int64_t elements_;     // of a sum over the tokens
  const bool streams_weight_;  // dW_up is written past the caches
};

template <class Operand>
void backward(const UpsampleBackward& call) {
  Backward<Operand> gradients(call);
  if (call.grad_tokens.data != nullptr) gradients.token_gradient();
  if (call.grad_weight.data != nullptr || call.grad_bias.data != nullptr) gradients.weight_gradient();
}

}  // namespace

void upsample_backward(const UpsampleBackward& call) {
  if (call.tokens == 0) return;
#if DECO_HAVE_BF16_DOT
  if (call.rows.dtype == DType::kBFloat16) return backward<PairOperand>(call);
#endif
  backward<FloatOperand>(call);
}

}  // namespace deco::cpu::DECO_CPU_ISA
