// Salient weights: what they differ by from the base weights that they replace, times x in float32.
#pragma once

#include <utility>

#include "activations.h"

namespace precalib {
namespace {

constexpr int64_t kResiduals = 64;  // about: decoded at a time, for all rows of x

// Adds residuals times x. tile: [columns][kTile]; sums: [row of the block][row of x], accumulated.
inline void add_residuals(const SalientResidual* residuals, int64_t count, const float* tile,
                          float* sums) {
  [&]<int... lane>(std::integer_sequence<int, lane...>) {
    F32x4 sum[kLanes] = {load<F32x4>(sums + lane * kTile)...};
    for (int64_t i = 0; i < count; ++i) {
      const F32x4* const delta = (const F32x4*)residuals[i].delta;
      ((sum[lane] = fused_add_lane<lane % kPart>(
            sum[lane], load<F32x4>(tile + residuals[i].column[lane] * int64_t(kTile)),
            delta[lane / kPart])),
       ...);
    }
    (store(sums + lane * kTile, sum[lane]), ...);
  }(std::make_integer_sequence<int, kLanes>{});
}

// Memory for the salient weights of a block.
struct SalientScratch {
  const int64_t groups_at_once, tiles;
  Buffer<SalientResidual> residuals;
  Buffer<float> sums;

  SalientScratch(const PackedLayout& layout, int64_t tiles)
      : groups_at_once(layout.salient_count ? kResiduals / layout.salient_count + 1 : 0),
        tiles(tiles),
        residuals(groups_at_once * layout.salient_count),
        sums(layout.salient_count ? tiles * kLanes * kTile : 0) {}
};

// Adds the salient weights of a block to its product. totals: [tiles * kTile][16].
inline void add_salient(const PackedLayout& layout, const Block& block, const float* tiles,
                        const SalientScratch& scratch, float* totals) {
  if (!layout.salient_count) return;
  constexpr int kSize = kLanes * kTile;
  std::memset(scratch.sums.data, 0, size_t(scratch.tiles) * kSize * sizeof(float));
  for (int64_t first = 0; first < layout.groups; first += scratch.groups_at_once) {
    const int64_t end = min(first + scratch.groups_at_once, layout.groups);
    SalientResidual* next = scratch.residuals.data;
    for (int64_t g = first; g < end; ++g) {
      const Group group = find_group(layout, block, g);
      const F32x16 scale = group_scales(layout, block, group);
      const F32x16 zero = group_zeros(layout, group);
      for (int64_t slot = 0; slot < layout.salient_count; ++slot)
        find_residual(layout, block, group, scale, zero, slot, *next++);
    }
    for (int64_t t = 0; t < scratch.tiles; ++t)
      add_residuals(scratch.residuals.data, next - scratch.residuals.data,
                    tiles + t * layout.columns * kTile, scratch.sums.data + t * kSize);
  }
  for (int64_t t = 0; t < scratch.tiles; ++t)
    for (int p = 0; p < kParts; ++p) {
      F32x4 square[kTile];
      for (int i = 0; i < kPart; ++i)
        square[i] = load<F32x4>(scratch.sums.data + t * kSize + (p * kPart + i) * kTile);
      transpose(square);
      for (int r = 0; r < kTile; ++r) {
        float* const to = totals + (t * kTile + r) * kLanes + p * kPart;
        store(to, load<F32x4>(to) + square[r]);
      }
    }
}

}  // namespace
}  // namespace precalib
