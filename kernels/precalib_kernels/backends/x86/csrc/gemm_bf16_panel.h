// Products in bfloat16, a span of columns at a time: the weights of a pair of blocks are written as
// bfloat16 and stay in the second cache while they are multiplied by all rows of x. Where rows are
// many, the next weights are written between the products of tiles, which take long and leave the
// rest of the core idle.
//
// What is written is up to a `Way`, `panel_unscaled.h` or `panel_dequantized.h`:
//   kBits
//   kScaled: whether scales are in the weights. If not, a span is a group, and rows are few.
//   span_columns(plan)
//   open(block, group): begins a group: a `Begun` with its `scale`, among others.
//   writer(begun): (index, out) writes a step's four columns, [segment % 2][16 rows][segment / 2].
//   close(begun, to, columns): what remains to be done to a group's weights.
#pragma once

#include "gemm_bf16.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

// A pair of blocks or one block, all rows of x in the tiles of its part, and its sums.
struct Share {
  const Block* blocks;
  int count;
  const uint16_t* x;
  float* totals;  // [tile of rows][count][16][16]
};

// The weights of a share in a span of whole groups, and their scales.
struct Panel {
  const Share* share;
  int64_t group, last_group, first, columns;
  uint16_t* weights;  // [share.count][columns][16]
  Floats scales[2];
};

// Writes panels.
template <class Way>
class Writer {
 public:
  explicit Writer(const Plan& plan) : plan_(plan), way_(plan) {}

  void write(Panel& panel) {
    for (int b = 0; b < panel.share->count; ++b) {
      uint16_t* to = panel.weights + b * panel.columns * kLanes;
      for (int64_t g = panel.group; g < panel.last_group; ++g) {
        panel.scales[b] = write(panel.share->blocks[b], g, to);
        to += plan_.group_size * kLanes;
      }
    }
  }

  // The same a chunk at a time.
  void begin(Panel& panel) {
    panel_ = &panel;
    out_ = panel.weights;
    index_ = panel.group;
    block_ = chunk_ = 0;
    left_ = panel.share->count * panel.columns / kChunk;
  }
  int64_t left() const { return left_; }  // chunks

  // All that is left.
  [[gnu::noinline]] void finish() {
    while (left_) advance<1>([](auto&& write) { write(std::integral_constant<int, 0>{}); });
  }

  // A chunk, the i-th of kTimes parts of it when multiply calls what it gets with i.
  template <int kTimes, class Multiply>
  [[gnu::always_inline]] void advance(Multiply&& multiply) {
    constexpr int kSteps = 8 / kTimes;
    if (chunk_ == 0) open();
    const auto use = [out = out_, write = way_.writer(begun_)](auto i, Shorts index)
                         __attribute__((always_inline)) { write(index, out + 4 * i * kLanes); };
    const ChunkPlanes<Way::kBits> chunk = planes(group_, chunk_);
    multiply([&]<int i>(std::integral_constant<int, i>) __attribute__((always_inline)) {
      chunk.template decode<i * kSteps, (i + 1) * kSteps>(use);
      in_order();
    });
    out_ += kChunk * kLanes;
    --left_;
    if (++chunk_ == group_.chunks) close();
  }

 private:
  ChunkPlanes<Way::kBits> planes(const Group& group, int64_t chunk) const {
    return {group.planes, group.chunks, chunk, 2 * plan_.block_bytes};
  }

  // Not inlined: more copies of the code do not fit into the caches of instructions.
  [[gnu::noinline]] Floats write(const Block& block, int64_t index, uint16_t* to) {
    const Group group = find_group(plan_, block, index);
    fetch_side(plan_, group, 2);
    const typename Way::Begun begun = way_.open(block, group);
    const auto write = way_.writer(begun);
    for (int64_t c = 0; c < group.chunks; ++c)
      planes(group, c).decode([&](auto i, Shorts index) {
        write(index, to + (c * kChunk + 4 * i) * kLanes);
      });
    way_.close(begun, to, group.columns);
    return begun.scale;
  }

  [[gnu::noinline]] void open() {
    const Block& block = panel_->share->blocks[block_];
    group_ = find_group(plan_, block, index_);
    fetch_side(plan_, group_, 2);
    begun_ = way_.open(block, group_);
    panel_->scales[block_] = begun_.scale;
  }

  [[gnu::noinline]] void close() {
    way_.close(begun_, out_ - group_.columns * kLanes, group_.columns);
    chunk_ = 0;
    if (++index_ < panel_->last_group) return;
    index_ = panel_->group;
    ++block_;
  }

  const Plan& plan_;
  Way way_;
  Panel* panel_ = nullptr;
  uint16_t* out_ = nullptr;
  int64_t index_ = 0, block_ = 0, chunk_ = 0, left_ = 0;
  Group group_;
  typename Way::Begun begun_;
};

// totals[block][row] += the sums of a tile of rows, scaled.
template <int kBlocks>
inline void add_scaled(const Floats* scales, const float* sums, int64_t rows, float* totals) {
  for (int b = 0; b < kBlocks; ++b) {
    const Floats scale = scales[b];
    const float* const from = sums + b * kTile * kLanes;
    float* const to = totals + b * kTile * kLanes;
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r)
      store(to + r * kLanes,
            load<Floats>(to + r * kLanes) + load<Floats>(from + r * kLanes) * scale);
  }
}

// Adds the products of a panel to the totals of all rows. step(multiply, number of products) is as
// multiply_pairs has it.
template <int kBlocks, bool kScaled, class Step>
inline void multiply_panel(const Panel& panel, int64_t rows, Step&& step) {
  constexpr int64_t kSize = kBlocks * kTile * kLanes;  // sums of a tile of rows
  const Share& share = *panel.share;
  const int64_t tile_stride = kTile * panel.columns;
  const uint16_t* const x = share.x + panel.first * padded_rows(rows);
  for_row_tiles(rows, [&]<int kRowTiles>(std::integral_constant<int, kRowTiles>, int64_t tile) {
    alignas(64) float unscaled[kScaled ? 1 : kRowTiles * kSize];
    float* const totals = share.totals + tile * kSize;
    float* const sums = kScaled ? totals : unscaled;
    multiply_pairs<kRowTiles, kBlocks, kScaled>(
        x + tile * tile_stride, tile_stride, panel.weights, kLanes * panel.columns,
        panel.columns / kPairColumns, rows - tile * kTile, !kScaled || panel.first == 0, sums,
        [&](auto&& multiply) __attribute__((always_inline)) {
          step(multiply, std::integral_constant<int, kRowTiles * kBlocks>{});
        });
    store_pairs<kRowTiles, kBlocks>(sums);
    if constexpr (!kScaled)
      for (int64_t t = 0; t < kRowTiles; ++t)
        add_scaled<kBlocks>(panel.scales, sums + t * kSize,
                            smaller(kTile, rows - (tile + t) * kTile), totals + t * kSize);
  });
}

// All products of some shares. weights: [2][2][span_columns * 16], for use in here.
template <class Way>
void multiply_shares(const Plan& plan, const Share* shares, int64_t count, int64_t rows,
                     uint16_t* weights) {
  if constexpr (!Way::kScaled)
    for (int64_t i = 0; i < count; ++i)
      std::memset(shares[i].totals, 0,
                  size_t(padded_rows(rows) * shares[i].count * kLanes) * sizeof(float));
  const int64_t span = Way::span_columns(plan);
  const int64_t groups = (span + plan.group_size - 1) / plan.group_size;
  int64_t group = 0, at = 0;
  const auto advance = [&](Panel& panel) {  // to the next: of the next share, or in the next span
    if (group >= plan.groups) return false;
    const int64_t first = group * plan.group_size, last_group = smaller(group + groups, plan.groups);
    panel.share = shares + at;
    panel.group = group;
    panel.last_group = last_group;
    panel.first = first;
    panel.columns = smaller(span, plan.columns - first);
    if (++at == count) {
      at = 0;
      group = last_group;
    }
    return true;
  };
  Panel panels[2];
  panels[0].weights = weights;
  panels[1].weights = weights + 2 * span * kLanes;
  Writer<Way> writer(plan);
  const auto multiply = [&](const Panel& panel) __attribute__((noinline)) {
    // Steps of four products take at most a chunk each, as evenly as it goes.
    const int64_t steps = padded_rows(rows) / (2 * kTile) * (panel.columns / kPairColumns);
    const int64_t chunks = writer.left();
    int64_t due = 0;
    const auto step = [&]<int kProducts>(auto&& products, std::integral_constant<int, kProducts>)
                          __attribute__((always_inline)) {
      if constexpr (Way::kScaled && kProducts == 4) {
        due += chunks;
        if (due >= steps) {
          due -= steps;
          if (writer.left()) return writer.template advance<kProducts>(products);
        }
      }
      products([](auto) {});
    };
    if (panel.share->count == 2) multiply_panel<2, Way::kScaled>(panel, rows, step);
    else multiply_panel<1, Way::kScaled>(panel, rows, step);
    writer.finish();
  };
  if (!Way::kScaled || rows <= kTile) {  // one after the other takes half the memory
    while (advance(panels[0])) {
      writer.write(panels[0]);
      multiply(panels[0]);
    }
    return;
  }
  bool more = advance(panels[0]);
  writer.write(panels[0]);
  for (int now = 0; more; now = 1 - now) {
    more = advance(panels[1 - now]);
    if (more) writer.begin(panels[1 - now]);
    multiply(panels[now]);
  }
}

}  // namespace
}  // namespace precalib

#endif
