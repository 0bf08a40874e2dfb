// Up to sixteen rows of x in bfloat16 without AMX: levels, which bfloat16 holds exactly, are multiplied
// in the registers where they are unpacked, and a group's products are scaled and added up. Salient
// weights are added from inputs that lie column by column.
#pragma once

#include "gemm_bf16.h"
#include "salient_residual.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

namespace precalib {
namespace {

// x in the tiles of `to_spans`, a group to a span, as floats: those of a group to
// [column][16 rows] of the whole row, and their sums by row.
inline void part_columns(const Plan& plan, const uint16_t* x, int64_t group, float* columns,
                         float* sums) {
  const int64_t first = group * plan.group_size;
  const int64_t end = smaller(first + plan.group_size, plan.columns);
  Floats sum = {};
  for (int64_t k = first; k < end; k += kPairColumns) {
    Floats pairs[kTile];  // of columns
    turn((const float*)(x + k * kTile), kTile, pairs);
    for (int i = 0; i < kTile; ++i) {
      const Floats low = (Floats)((Words)pairs[i] << 16);
      const Floats high = (Floats)((Words)pairs[i] & 0xffff0000u);
      float* const to = columns + (k + i / 2 * 4 + i % 2) * kTile;
      store(to, low);
      store(to + 2 * kTile, high);
      sum += low + high;
    }
  }
  store(sums, sum);
}

// The products of a group and up to kRows rows of x, scaled. tiles: of these rows; input_sums: of the
// group, by row; totals: [row][16], added to.
template <int kBits, int kRows>
[[gnu::noinline]] void held_group(const Plan& plan, const Group& group, const uint16_t* tiles,
                                  const BfloatLevels<kBits>& levels, Floats scale, Floats zero,
                                  const float* input_sums, float* totals) {
  Floats sum[kRows] = {};
  decode<kBits>(group.planes, group.chunks, plan.block_bytes, [&](int64_t step, Shorts index, auto) {
    const auto [even, odd] = levels.find(index);
    const uint16_t* const from = tiles + step / 8 * kPairTile + step % 8 * 4;
    const auto add = [&](Shorts pair, const uint16_t* inputs) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i both = _mm512_set1_epi32(load<int32_t>(inputs + r * kPairColumns));
        sum[r] = (Floats)_mm512_dpbf16_ps((__m512)sum[r], (__m512bh)both, (__m512bh)pair);
      }
    };
    add(even, from);
    add(odd, from + 2);
  });
  if (plan.uniform)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r] -= zero * input_sums[r];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    store(totals + r * kLanes, load<Floats>(totals + r * kLanes) + sum[r] * scale);
}

// A block times up to kRows rows of x, without what salient weights change. input_sums: [group][16];
// totals: [16][16].
template <int kBits, int kRows>
void held_block(const Plan& plan, const Block& block, const uint16_t* x, const float* input_sums,
                const BfloatLevels<kBits>& levels, float* totals) {
  std::memset(totals, 0, kRows * kLanes * sizeof(float));
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Group group = find_group(plan, block, g);
    fetch_side(plan, group, 1);
    held_group<kBits, kRows>(plan, group, x + group.first * kTile, levels,
                             group_scales(plan, block, group), group_zeros(plan, group),
                             input_sums + g * kTile, totals);
  }
}

}  // namespace
}  // namespace precalib

#endif
