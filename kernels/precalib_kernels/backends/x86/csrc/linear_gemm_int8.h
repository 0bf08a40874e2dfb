// Driver of the INT8 GEMM.
#pragma once

#include "gemm_int8.h"
#include "salient_sums.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int64_t kInt8SlabRows = 64;  // rows of x that are quantized at a time

// Memory of quantized tiles of sixteen rows of x.
template <int kSplits>
class QuantizedActivations {
 public:
  QuantizedActivations(const X86Layout& layout, int64_t count)
      : tiles_(count * int8_tiles(layout) * kSplits * kInt8TileBytes),
        units_(count * layout.groups * kTile),
        totals_(count * layout.groups * kTile),
        starts_(count * layout.groups * kTile * kSplits),
        columns_(layout.salient_count ? count * layout.columns * kTile : 0),
        quantized_(count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t groups = i * layout.groups * kTile;
      quantized_.data[i] = {tiles_.data + i * int8_tiles(layout) * kSplits * kInt8TileBytes,
                            units_.data + groups, totals_.data + groups,
                            starts_.data + groups * kSplits,
                            columns_.data + i * layout.columns * kTile};
    }
  }
  const QuantizedTile& operator[](int64_t i) const { return quantized_.data[i]; }

 private:
  Buffer<int8_t> tiles_;
  Buffer<float> units_, totals_;
  Buffer<int32_t> starts_;
  Buffer<float> columns_;
  Buffer<QuantizedTile> quantized_;
};

template <int kBits, int kSplits>
void run_gemm_int8(const Problem& problem) {
  constexpr int kMost = kSplits < 3 ? 2 : 1;  // blocks whose sums fit into AMX tiles
  constexpr int64_t kSize = kTile * kLanes;   // sums of a block and a tile of rows
  const Call& call = problem.call;
  const X86Layout& layout = problem.layout;
  const int64_t slab = min(kInt8SlabRows, call.rows);
  const int64_t row_tiles = (slab + kTile - 1) / kTile;
  const int64_t pairs = count_pairs(layout), task_pairs = pairs_per_task(problem, kTaskPairs);
  QuantizedActivations<kSplits> x(layout, problem.variants * row_tiles);
#pragma omp parallel if (!problem.single_thread)
  {
    const AmxTiles registers(call.rows);
    PairRange range(task_pairs);
    Buffer<float> permuted(kTile * layout.group_size), sums(task_pairs * 2 * row_tiles * kSize);
    SalientSums salient(layout, task_pairs, row_tiles);
    Buffer<uint8_t> entries(2 * int8_tiles(min(layout.group_size, layout.columns)) *
                            kInt8TileBytes);
    for (int64_t first = 0; first < call.rows; first += slab) {
      const int64_t rows = min(slab, call.rows - first);
#pragma omp for
      for (int64_t i = 0; i < problem.variants * row_tiles * layout.groups; ++i) {
        const int64_t tile = i / layout.groups, group = i % layout.groups;  // of all variants
        const int64_t top = tile % row_tiles * kTile, there = min(kTile, rows - top);
        if (there <= 0) continue;
        problem.permute_tile(first + top, there, tile / row_tiles, group, permuted.data);
        quantize_tile<kSplits>(layout, permuted.data, group, there, x[tile]);
      }
#pragma omp for
      for (int64_t at = 0; at < pairs; at += task_pairs) {
        range.assign(problem, at);
        const auto inputs = [&](const Block& block) {
          return &x[problem.variant(block) * row_tiles];
        };
        const auto at_block = [&](int64_t p, int b) { return (2 * p + b) * row_tiles * kSize; };
        range.template for_each<kMost>([&]<int kBlocks>(int64_t p, const Block* blocks, int b) {
          gemm_int8_blocks<kBits, kSplits, kBlocks>(layout, blocks, inputs(*blocks), rows,
                                                    entries.data, sums.data + at_block(p, b));
        });
        salient.compute(range, rows,
                        [&](const Block& block, int64_t t) { return inputs(block)[t].columns; });
        range.template for_each<kMost>([&]<int kBlocks>(int64_t p, const Block* blocks, int b) {
          float* const to = sums.data + at_block(p, b);
          salient.add<kBlocks>(p, b, rows, to);
          store_tiles<kBlocks>(problem, blocks, first, rows, to);
        });
      }
    }
  }
}

}  // namespace
}  // namespace precalib

#endif
