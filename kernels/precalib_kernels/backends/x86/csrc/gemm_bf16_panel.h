// Panel BF16 GEMM. A panel is a pair of blocks (32 rows of weights) by some columns, unpacked to
// bfloat16. It stays in the second-level cache while it is multiplied by all rows of x. For large M
// the next panel is unpacked between the tile products of this one, which leave the core's vector
// units idle.
//
// How weights are unpacked is a policy, `UnscaledPanel` (panel_unscaled.h) or `DequantizedPanel`
// (panel_dequantized.h), with these members:
//   kBits                      bits of a code
//   kDequantized               whether weights are multiplied by their scales. If not, a panel is
//                              one group wide, its sums are scaled, and M is small.
//   panel_columns(layout)      columns of a panel
//   begin_group(block, group)  -> GroupState, which has the group's `scale`
//   writer(state)              -> function (index, out) that writes the four columns of a step,
//                              [segment % 2][16 rows][segment / 2]
//   end_group(state, to, columns)  finishes the group's weights
#pragma once

#include "gemm_bf16.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

// A pair of blocks or one block, the tiles of x that it is multiplied by, and its sums.
struct WorkItem {
  const Block* blocks;
  int count;
  const uint16_t* x;
  float* totals;  // [tile of rows][count][16][16]
};

// The unpacked weights of a work item in some whole groups, and the scales of the last one.
struct Panel {
  const WorkItem* item;
  int64_t group, last_group, first, columns;
  uint16_t* weights;  // [item->count][columns][16]
  F32x16 scales[2];
};

// Unpacks panels, at once or a chunk of 32 columns at a time.
template <class PanelPolicy>
class PanelWriter {
 public:
  explicit PanelWriter(const X86Layout& layout) : layout_(layout), policy_(layout) {}

  void write(Panel& panel) {
    for (int b = 0; b < panel.item->count; ++b) {
      uint16_t* to = panel.weights + b * panel.columns * kLanes;
      for (int64_t g = panel.group; g < panel.last_group; ++g) {
        panel.scales[b] = write(panel.item->blocks[b], g, to);
        to += layout_.group_size * kLanes;
      }
    }
  }

  // Begins a panel that `advance` and `finish` unpack.
  void begin(Panel& panel) {
    panel_ = &panel;
    out_ = panel.weights;
    index_ = panel.group;
    block_ = chunk_ = 0;
    left_ = panel.item->count * panel.columns / kChunk;
  }
  int64_t left() const { return left_; }  // chunks

  // Unpacks the chunks that are left.
  [[gnu::noinline]] void finish() {
    while (left_) advance<1>([](auto&& write) { write(std::integral_constant<int, 0>{}); });
  }

  // Unpacks one chunk in kTimes parts: multiply(after) calls after(i) to unpack part i.
  template <int kTimes, class Multiply>
  [[gnu::always_inline]] void advance(Multiply&& multiply) {
    constexpr int kSteps = 8 / kTimes;
    if (chunk_ == 0) begin_group();
    const auto use = [out = out_, write = policy_.writer(state_)](auto i, U16x32 index)
                         __attribute__((always_inline)) { write(index, out + 4 * i * kLanes); };
    const ChunkPlanes<PanelPolicy::kBits> chunk = planes(group_, chunk_);
    multiply([&]<int i>(std::integral_constant<int, i>) __attribute__((always_inline)) {
      chunk.template decode<i * kSteps, (i + 1) * kSteps>(use);
      compiler_fence();
    });
    out_ += kChunk * kLanes;
    --left_;
    if (++chunk_ == group_.chunks) end_group();
  }

 private:
  ChunkPlanes<PanelPolicy::kBits> planes(const Group& group, int64_t chunk) const {
    return {group.planes, group.chunks, chunk, 2 * layout_.block_bytes};
  }

  // Not inlined: more copies of this code exceed the instruction cache.
  [[gnu::noinline]] F32x16 write(const Block& block, int64_t index, uint16_t* to) {
    const Group group = find_group(layout_, block, index);
    prefetch_metadata(layout_, group, 2);
    const typename PanelPolicy::GroupState state = policy_.begin_group(block, group);
    const auto write = policy_.writer(state);
    for (int64_t c = 0; c < group.chunks; ++c)
      planes(group, c).decode(
          [&](auto i, U16x32 index) { write(index, to + (c * kChunk + 4 * i) * kLanes); });
    policy_.end_group(state, to, group.columns);
    return state.scale;
  }

  [[gnu::noinline]] void begin_group() {
    const Block& block = panel_->item->blocks[block_];
    group_ = find_group(layout_, block, index_);
    prefetch_metadata(layout_, group_, 2);
    state_ = policy_.begin_group(block, group_);
    panel_->scales[block_] = state_.scale;
  }

  [[gnu::noinline]] void end_group() {
    policy_.end_group(state_, out_ - group_.columns * kLanes, group_.columns);
    chunk_ = 0;
    if (++index_ < panel_->last_group) return;
    index_ = panel_->group;
    ++block_;
  }

  const X86Layout& layout_;
  PanelPolicy policy_;
  Panel* panel_ = nullptr;
  uint16_t* out_ = nullptr;
  int64_t index_ = 0, block_ = 0, chunk_ = 0, left_ = 0;
  Group group_;
  typename PanelPolicy::GroupState state_;
};

// totals[block][row] += sums[block][row] * scales[block], for a tile of rows.
template <int kBlocks>
inline void add_scaled(const F32x16* scales, const float* sums, int64_t rows, float* totals) {
  for (int b = 0; b < kBlocks; ++b) {
    const F32x16 scale = scales[b];
    const float* const from = sums + b * kTile * kLanes;
    float* const to = totals + b * kTile * kLanes;
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r)
      store(to + r * kLanes,
            load<F32x16>(to + r * kLanes) + load<F32x16>(from + r * kLanes) * scale);
  }
}

// Multiplies a panel by all rows of x and adds to the item's totals. step(multiply, number of tile
// products) is called as `multiply_bf16_tiles` calls it.
template <int kBlocks, bool kDequantized, class Step>
inline void multiply_panel(const Panel& panel, int64_t rows, Step&& step) {
  constexpr int64_t kSize = kBlocks * kTile * kLanes;  // sums of a tile of rows
  const WorkItem& item = *panel.item;
  const int64_t tile_stride = kTile * panel.columns;
  const uint16_t* const x = item.x + panel.first * padded_rows(rows);
  for_row_tiles(rows, [&]<int kRowTiles>(std::integral_constant<int, kRowTiles>, int64_t tile) {
    alignas(64) float unscaled[kDequantized ? 1 : kRowTiles * kSize];
    float* const totals = item.totals + tile * kSize;
    float* const sums = kDequantized ? totals : unscaled;
    multiply_bf16_tiles<kRowTiles, kBlocks, kDequantized>(
        x + tile * tile_stride, tile_stride, panel.weights, kLanes * panel.columns,
        panel.columns / kBf16TileColumns, rows - tile * kTile, !kDequantized || panel.first == 0,
        sums, [&](auto&& multiply) __attribute__((always_inline)) {
          step(multiply, std::integral_constant<int, kRowTiles * kBlocks>{});
        });
    store_bf16_tiles<kRowTiles, kBlocks>(sums);
    if constexpr (!kDequantized)
      for (int64_t t = 0; t < kRowTiles; ++t)
        add_scaled<kBlocks>(panel.scales, sums + t * kSize, min(kTile, rows - (tile + t) * kTile),
                            totals + t * kSize);
  });
}

// Multiplies some work items by all rows of x. weights: scratch [2][2][panel_columns * 16].
template <class PanelPolicy>
void multiply_panels(const X86Layout& layout, const WorkItem* items, int64_t count, int64_t rows,
                     uint16_t* weights) {
  if constexpr (!PanelPolicy::kDequantized)
    for (int64_t i = 0; i < count; ++i)
      std::memset(items[i].totals, 0,
                  size_t(padded_rows(rows) * items[i].count * kLanes) * sizeof(float));
  const int64_t panel_columns = PanelPolicy::panel_columns(layout);
  const int64_t groups = (panel_columns + layout.group_size - 1) / layout.group_size;
  int64_t group = 0, at = 0;
  // To the next panel: of the next item, or of the first item and the next columns.
  const auto advance = [&](Panel& panel) {
    if (group >= layout.groups) return false;
    const int64_t first = group * layout.group_size,
                  last_group = min(group + groups, layout.groups);
    panel.item = items + at;
    panel.group = group;
    panel.last_group = last_group;
    panel.first = first;
    panel.columns = min(panel_columns, layout.columns - first);
    if (++at == count) {
      at = 0;
      group = last_group;
    }
    return true;
  };
  Panel panels[2];
  panels[0].weights = weights;
  panels[1].weights = weights + 2 * panel_columns * kLanes;
  PanelWriter<PanelPolicy> writer(layout);
  const auto multiply = [&](const Panel& panel) __attribute__((noinline)) {
    // Each step of four tile products unpacks at most one chunk; chunks are spread evenly.
    const int64_t steps = padded_rows(rows) / (2 * kTile) * (panel.columns / kBf16TileColumns);
    const int64_t chunks = writer.left();
    int64_t due = 0;
    const auto step = [&]<int kProducts>(auto&& products, std::integral_constant<int, kProducts>)
                          __attribute__((always_inline)) {
                            if constexpr (PanelPolicy::kDequantized && kProducts == 4) {
                              due += chunks;
                              if (due >= steps) {
                                due -= steps;
                                if (writer.left())
                                  return writer.template advance<kProducts>(products);
                              }
                            }
                            products([](auto) {});
                          };
    if (panel.item->count == 2) multiply_panel<2, PanelPolicy::kDequantized>(panel, rows, step);
    else multiply_panel<1, PanelPolicy::kDequantized>(panel, rows, step);
    writer.finish();
  };
  if (!PanelPolicy::kDequantized || rows <= kTile) {  // no overlap: half the memory
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
