// INT8 GEMM, M > 4: the codebook entries of a group of a block are written to a panel of a few KB,
// which all rows of x are multiplied with; sums are scaled group by group.
#pragma once

#include "problem.h"
#include "products.h"

namespace precalib {
namespace {

// Rows of x that are multiplied at a time: their sums for 16 rows fill half of the registers.
template <int kSplits>
constexpr int kRowsAtOnce = kSplits == 1                 ? 4
                            : kSplits == 2 || kHasMatrix ? 2
                                                         : 1;

// Codebook entries of a group of a block, in the order of `store_entries`.
template <int kBits, bool kTrellis>
inline void decode_panel(const Codebook<kBits>& codebook, const Group& group, int8_t* panel) {
  PlaneBefore before(group.planes, group.chunks);
  for (int64_t c = 0; c < group.chunks; ++c) {
    for (int p = 0; p < kParts; ++p) {
      I8x16 entries[8];
      decode_chunk<kBits, kTrellis>(codebook, group.planes + 16 * p, group.chunks, c,
                                    before.part(p), entries);
      store_entries<kHasMatrix>(entries, p, panel + 8 * c * kVector);
    }
    before.next(group.planes + c * kVector);
  }
}

// Multiplies a panel with kRows rows of x from `row` on. totals: [rows][16], accumulated.
template <int kSplits, int kRows>
inline void multiply_panel(const PackedLayout& layout, const Group& group, int64_t g,
                           const int8_t* panel, const Inputs& inputs, const F32x16& scale,
                           const F32x16& zero, int64_t row, float* totals) {
  TileSums<kSplits * kRows, kHasMatrix> sums;
  sums.add(panel, group.columns / 4,
           inputs.splits + split_place<kHasMatrix>(layout.columns, row * kSplits, group.first),
           layout.columns);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
      add_scaled(join_splits<kSplits>([&](int d) { return sums.of(r * kSplits + d, p); }),
                 scale.part[p], zero.part[p], inputs.groups[(row + r) * layout.groups + g],
                 totals + (row + r) * kLanes + p * kPart);
}

// A block of weights times `rows` rows of x, a multiple of kTile. panel: [group_size][16]; totals:
// [rows][16], overwritten.
template <int kBits, bool kTrellis, int kSplits>
void gemm_block(const PackedLayout& layout, const Block& block, const Inputs& inputs, int64_t rows,
                int8_t* panel, SalientSums& salient, float* totals) {
  constexpr int kRows = kRowsAtOnce<kSplits>;
  const Codebook<kBits> codebook(layout);
  std::memset(totals, 0, size_t(rows) * kLanes * sizeof(float));
  salient.begin();
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    decode_panel<kBits, kTrellis>(codebook, group, panel);
    const F32x16 scale = group_scales(layout, block, group), zero = group_zeros(layout, group);
    for (int64_t row = 0; row < rows; row += kRows)
      multiply_panel<kSplits, kRows>(layout, group, g, panel, inputs, scale, zero, row, totals);
    salient.add(block, group, g, scale, zero, inputs.tiles);
  }
  salient.finish(inputs.tiles, totals);
}

template <int kBits, bool kTrellis, int kSplits>
void run_gemm_int8(const Problem& problem) {
  const PackedLayout& layout = problem.layout;
  const int64_t slab = min(kSlabRows, round_up(problem.call.rows, kTile));
  InputBuffers<kHasMatrix, kSplits> buffers(problem, slab / kTile);
#pragma omp parallel if (!problem.single_thread)
  {
    Buffer<float> scratch(kTile * layout.columns), totals(slab * kLanes);
    Buffer<int8_t> panel(min(layout.group_size, layout.columns) * kLanes);
    for (int64_t first = 0; first < problem.call.rows; first += slab) {
      const int64_t rows = min(slab, problem.call.rows - first);
      const int64_t tiles = round_up(rows, kTile) / kTile;
#pragma omp for
      for (int64_t i = 0; i < problem.variants * tiles; ++i)
        buffers.prepare(first, i / tiles, i % tiles, scratch.data);
      SalientSums salient(layout, tiles);
#pragma omp for
      for (int64_t b = 0; b < problem.blocks; ++b) {
        const Block block = find_block(layout, problem.call.packed, b);
        const Inputs inputs = buffers.of(problem.variant(block));
        gemm_block<kBits, kTrellis, kSplits>(layout, block, inputs, tiles * kTile, panel.data,
                                             salient, totals.data);
        store_totals(problem, block, first, rows, totals.data);
      }
    }
  }
}

}  // namespace
}  // namespace precalib
