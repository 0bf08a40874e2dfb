// Salient residuals: what salient weights differ by from the base weights that they replace, times
// x in float32, added to the product of the base weights.
#pragma once

#include "amx_tiles.h"

#if defined(__AVX512F__)

namespace precalib {
namespace {

// One salient weight of each row of a block.
struct SalientResidual {
  alignas(64) float delta[kLanes];       // salient minus base weight
  alignas(64) int32_t x_offset[kLanes];  // of its column in the transposed x
};

// Decodes the salient weights of some groups. A pass of its own, since reading back at once what
// was just stored stalls.
inline void find_residuals(const X86Layout& layout, const Block& block, int64_t first_group,
                           int64_t last_group, SalientResidual* residuals) {
  for (int64_t g = first_group; g < last_group; ++g) {
    const Group group = find_group(layout, block, g);
    const F32x16 scale = group_scales(layout, block, group);
    const F32x16 zero = group_zeros(layout, group);
    for (int64_t j = 0; j < layout.salient_count; ++j, ++residuals) {
      const Salient salient = find_salient(layout, block, group, j);
      const F32x16 base = (salient.base_entry - zero) * scale;
      store(residuals->delta, (I32x16)(salient.value - base) & salient.used);
      store(residuals->x_offset,
            ((salient.position & salient.used) + int32_t(group.first)) * kTile);
    }
  }
}

// Adds residuals times x. columns: x transposed, [column][16 rows]; sums: [row of the block][row of
// x], accumulated.
inline void add_residuals(const SalientResidual* residuals, int64_t count, const float* columns,
                          float* sums) {
  [&]<int... lane>(std::integer_sequence<int, lane...>) {
    F32x16 sum[kLanes] = {load<F32x16>(sums + lane * kTile)...};
    for (int64_t i = 0; i < count; ++i)
      (fma_broadcast(sum[lane], residuals[i].delta + lane,
                     load<F32x16>(columns + residuals[i].x_offset[lane])),
       ...);
    (store(sums + lane * kTile, sum[lane]), ...);
  }(std::make_integer_sequence<int, kLanes>{});
}

// totals [row of x][row of the block] += sums, transposed.
inline void add_transposed(const float* sums, int64_t rows, float* totals) {
  F32x16 square[kTile];
  transpose_16x16(sums, kTile, square);
  for (int64_t r = 0; r < rows; ++r)
    store(totals + r * kLanes, load<F32x16>(totals + r * kLanes) + square[r]);
}

}  // namespace
}  // namespace precalib

#endif
