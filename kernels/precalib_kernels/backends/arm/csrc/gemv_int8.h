// INT8 GEMV, M <= 4: codebook entries times the int8 splits of x in the registers where they are
// decoded, scaled group by group.
#pragma once

#include "problem.h"
#include "products.h"

namespace precalib {
namespace {

// SMMLA pays from four virtual rows of x on: below that, zipping costs what it saves.
template <int kSplits, int kRows>
constexpr bool kMatrixGemv = kHasMatrix && kSplits * kRows >= 4;

// Parts of a block at a time: few virtual rows leave registers for all four.
constexpr int parts_at_once(int virtual_rows) {
  return virtual_rows <= 3 ? kParts : virtual_rows <= 6 ? 2 : 1;
}

// A block of weights times kRows rows of x. totals: [kTile][16], overwritten. Not inlined: GCC finds
// registers for all sums in a function of its own.
template <int kBits, bool kTrellis, int kSplits, int kRows>
[[gnu::noinline]] void gemv_block(const PackedLayout& layout, const Block& block,
                                  const Inputs& inputs, SalientSums& salient, float* totals) {
  constexpr int kVirtual = kSplits * kRows, kAtOnce = parts_at_once(kVirtual);
  constexpr bool kMatrix = kMatrixGemv<kSplits, kRows>;
  const Codebook<kBits> codebook(layout);
  std::memset(totals, 0, kTile * kLanes * sizeof(float));
  salient.begin();
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    prefetch(group.scales + layout.groups * layout.metadata_bytes);
    const int8_t* const splits =
        inputs.splits + split_place<kMatrix>(layout.columns, 0, group.first);
    if constexpr (kAtOnce < kParts)
      for (int64_t at = 0; at < group.chunks * kBits * kVector; at += kVector)
        prefetch(group.planes + at + layout.block_bytes);
    F32x16 scale, zero;
    for (int first = 0; first < kParts; first += kAtOnce) {
      PartSums<kVirtual, kMatrix> sums[kAtOnce];
      PlaneBefore before(group.planes, group.chunks);
      for (int64_t c = 0; c < group.chunks; ++c) {
        if constexpr (kAtOnce == kParts)
          for (int p = 0; p < kBits; ++p)
            prefetch(group.planes + (c * kBits + p) * kVector + layout.block_bytes);
#pragma GCC unroll 4  // else GCC keeps the sums in memory
        for (int p = 0; p < kAtOnce; ++p) {
          I8x16 entries[8];
          decode_chunk<kBits, kTrellis>(codebook, group.planes + 16 * (first + p), group.chunks, c,
                                        before.part(first + p), entries);
          sums[p].add(entries, splits + split_place<kMatrix>(layout.columns, 0, c * kChunk),
                      layout.columns);
        }
        before.next(group.planes + c * kVector);
      }
      if (first == 0) {
        scale = group_scales(layout, block, group);
        zero = group_zeros(layout, group);
      }
#pragma GCC unroll 4
      for (int p = 0; p < kAtOnce; ++p)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const F32x4 dot =
              join_splits<kSplits>([&](int d) { return sums[p].of(r * kSplits + d); });
          add_scaled(dot, scale.part[first + p], zero.part[first + p],
                     inputs.groups[r * layout.groups + g],
                     totals + r * kLanes + (first + p) * kPart);
        }
    }
    salient.add(block, group, g, scale, zero, inputs.tiles);
  }
  salient.finish(inputs.tiles, totals);
}

template <int kBits, bool kTrellis, int kSplits, int kRows>
void run_gemv_int8(const Problem& problem) {
  constexpr bool kMatrix = kMatrixGemv<kSplits, kRows>;
  const PackedLayout& layout = problem.layout;
  InputBuffers<kMatrix, kSplits> buffers(problem, 1);
  Buffer<float> scratch(kTile * layout.columns);
  for (int64_t v = 0; v < problem.variants; ++v) buffers.prepare(0, v, 0, scratch.data);
#pragma omp parallel if (!problem.single_thread)
  {
    SalientSums salient(layout, 1);
#pragma omp for
    for (int64_t b = 0; b < problem.blocks; ++b) {
      const Block block = find_block(layout, problem.call.packed, b);
      const Inputs inputs = buffers.of(problem.variant(block));
      alignas(64) float totals[kTile * kLanes];
      gemv_block<kBits, kTrellis, kSplits, kRows>(layout, block, inputs, salient, totals);
      store_totals(problem, block, 0, kRows, totals);
    }
  }
}

template <int kBits, bool kTrellis, int kSplits>
void choose_gemv_int8(const Problem& problem) {
  switch (problem.call.rows) {
    case 1: return run_gemv_int8<kBits, kTrellis, kSplits, 1>(problem);
    case 2: return run_gemv_int8<kBits, kTrellis, kSplits, 2>(problem);
    case 3: return run_gemv_int8<kBits, kTrellis, kSplits, 3>(problem);
    default: return run_gemv_int8<kBits, kTrellis, kSplits, 4>(problem);
  }
}

}  // namespace
}  // namespace precalib
