// FP32 GEMM on ISAs without VBMI: a group's weights are dequantized to a panel of float32, salient
// weights in their places, and multiplied and added.
#pragma once

#include "shuffle_levels.h"
#include "shuffle_tiles.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

struct FloatProduct {
  using Split = float;
  static constexpr int kVectors = 4;
  static Floats add(Floats sum, Words weights, Ints x) { return sum + (Floats)weights * (Floats)x; }
};

// Dequantizes a group of a block. weights: [4 * step + segment][16].
template <int kBits, bool kTrellis>
inline void dequantize_group(const X86Layout& layout, const Block& block, const Group& group,
                             const LevelTable<kBits, kTrellis>& table, float* weights) {
  for (int part = 0; part < kParts; ++part) {
    const Floats scale = group_scales<NativeLanes>(layout, block, group, part * kPartRows);
    const Floats zero = group_zeros<NativeLanes>(layout, group, part * kPartRows);
    decode_entries(table, group.planes + part * kWidth, group.chunks, layout.block_bytes,
                   [&](int64_t c, auto i, Words entries) {
                     float* const to = weights + (8 * c + i) * 4 * kLanes + part * kPartRows;
#pragma GCC unroll 4
                     for (int s = 0; s < 4; ++s) {
                       const Floats entry = to_float((Ints)entries << (24 - 8 * s) >> 24);
                       store(to + s * kLanes, (entry - zero) * scale);
                     }
                   });
  }
  for (int64_t j = 0; j < layout.salient_count; ++j)
    for (int row = 0; row < kLanes; row += kPartRows) {
      const auto salient = find_salient<NativeLanes>(layout, block, group, j, row);
      for (int lane = 0; lane < kPartRows; ++lane)
        if (salient.used[lane])
          weights[salient.position[lane] * kLanes + row + lane] = salient.value[lane];
    }
}

// sums[row][16] += a panel of weights times all rows of x. x: [row][group_size].
inline void multiply_panel_fp32(const float* weights, int64_t columns, const float* x,
                                int64_t group_size, int64_t rows, float* sums) {
  for_tiles(rows, [&]<int kRows>(int64_t first) {
    float* const to = sums + first * kLanes;
    multiply_tile<FloatProduct, kRows>(
        (const uint8_t*)weights, (const uint8_t*)(x + first * group_size), group_size * 4, columns,
        [&](int r, int p) { return load<Floats>(to + r * kLanes + p * kPartRows); },
        [&](int r, int p, Floats sum) { store(to + r * kLanes + p * kPartRows, sum); });
  });
}

}  // namespace
}  // namespace precalib

#endif
