// Register BF16 GEMM, M <= 16, without AMX: codebook entries are multiplied (VDPBF16PS) in the
// registers where they are unpacked, and a group's sums are scaled. Salient weights are added as
// residuals, see `salient_residual.h`.
#pragma once

#include "gemm_bf16.h"
#include "salient_residual.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

namespace precalib {
namespace {

// Transposes one group of x, bfloat16 in the tiles of `permute_to_panels` with panels one group
// wide, to float32. columns: of the whole row, [column][16 rows]; sums: of the group by row, [16].
inline void transpose_columns(const X86Layout& layout, const uint16_t* x, int64_t group,
                              float* columns, float* sums) {
  const int64_t first = group * layout.group_size;
  const int64_t end = min(first + layout.group_size, layout.columns);
  F32x16 sum = {};
  for (int64_t k = first; k < end; k += kBf16TileColumns) {
    F32x16 pairs[kTile];  // pairs of columns
    transpose_16x16((const float*)(x + k * kTile), kTile, pairs);
    for (int i = 0; i < kTile; ++i) {
      const F32x16 low = (F32x16)((U32x16)pairs[i] << 16);
      const F32x16 high = (F32x16)((U32x16)pairs[i] & 0xffff0000u);
      float* const to = columns + (k + i / 2 * 4 + i % 2) * kTile;
      store(to, low);
      store(to + 2 * kTile, high);
      sum += low + high;
    }
  }
  store(sums, sum);
}

// totals[row][16] += a group of weights times kRows rows of x, scaled. tiles: of these rows;
// input_sums: of the group, by row.
template <int kBits, int kRows>
[[gnu::noinline]] void register_group(const X86Layout& layout, const Group& group,
                                      const uint16_t* tiles, const Bf16Codebook<kBits>& codebook,
                                      F32x16 scale, F32x16 zero, const float* input_sums,
                                      float* totals) {
  F32x16 sum[kRows] = {};
  decode<kBits>(
      group.planes, group.chunks, layout.block_bytes, [&](int64_t step, U16x32 index, auto) {
        const auto [even, odd] = codebook.lookup(index);
        const uint16_t* const from = tiles + step / 8 * kBf16TileSize + step % 8 * 4;
        const auto add = [&](U16x32 pair, const uint16_t* inputs) {
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const __m512i inputs_pair =
                _mm512_set1_epi32(load<int32_t>(inputs + r * kBf16TileColumns));
            sum[r] =
                (F32x16)_mm512_dpbf16_ps((__m512)sum[r], (__m512bh)inputs_pair, (__m512bh)pair);
          }
        };
        add(even, from);
        add(odd, from + 2);
      });
  if (layout.uniform)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r] -= zero * input_sums[r];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    store(totals + r * kLanes, load<F32x16>(totals + r * kLanes) + sum[r] * scale);
}

// A block of weights times kRows rows of x, without its salient residuals. input_sums: [group][16];
// totals: [16][16], overwritten.
template <int kBits, int kRows>
void register_block(const X86Layout& layout, const Block& block, const uint16_t* x,
                    const float* input_sums, const Bf16Codebook<kBits>& codebook, float* totals) {
  std::memset(totals, 0, kRows * kLanes * sizeof(float));
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    prefetch_metadata(layout, group, 1);
    register_group<kBits, kRows>(layout, group, x + group.first * kTile, codebook,
                                 group_scales(layout, block, group), group_zeros(layout, group),
                                 input_sums + g * kTile, totals);
  }
}

}  // namespace
}  // namespace precalib

#endif
