// Salient weights: what they differ by from the base weights that they replace, times x in float32.
#pragma once

#include <utility>

#include "activations.h"

namespace precalib {
namespace {

static_assert(kTile == 4);          // a vector
constexpr int64_t kResiduals = 64;  // about: decoded at a time, for all rows of x

// Adds residuals times x. tile: [groups][group_size + 1][kTile]; sums: [row of the block][row of x],
// accumulated.
template <class Position>
inline void add_residuals(const SalientResidual* residuals, int64_t count, const float* tile,
                          float* sums) {
  [&]<int... lane>(std::integer_sequence<int, lane...>) {
    F32x4 sum[kLanes] = {load<F32x4>(sums + lane * kTile)...};
    for (int64_t i = 0; i < count; ++i) {
      const F32x4* const delta = (const F32x4*)residuals[i].delta;
      const Position* const at = (const Position*)residuals[i].positions;
      const F32x4* const x = (const F32x4*)tile + residuals[i].column;
      ((sum[lane] = fused_add_lane<lane % kPart>(sum[lane], x[at[lane]], delta[lane / kPart])),
       ...);
    }
    (store(sums + lane * kTile, sum[lane]), ...);
  }(std::make_integer_sequence<int, kLanes>{});
}

// The part of a block's product that its salient weights add.
class SalientSums {
 public:
  // tiles: of x.
  SalientSums(const PackedLayout& layout, int64_t tiles)
      : layout_(layout),
        tiles_(tiles),
        residuals_(layout.salient_count ? kResiduals + layout.salient_count : 0),
        sums_(layout.salient_count ? tiles * kSize : 0) {}

  void begin() {
    count_ = 0;
    if (layout_.salient_count) std::memset(sums_.data, 0, size_t(tiles_ * kSize) * sizeof(float));
  }
  // Takes the salient weights of group g. x: tiles.
  void add(const Block& block, const Group& group, int64_t g, const F32x16& scale,
           const F32x16& zero, const float* x) {
    if (layout_.salient_count) add_some(block, group, g, scale, zero, x);
  }
  // totals [tiles * kTile][16] += all of them.
  void finish(const float* x, float* totals) {
    if (!layout_.salient_count) return;
    multiply(x);
    for (int64_t t = 0; t < tiles_; ++t)
      for (int p = 0; p < kParts; ++p) {
        F32x4 square[kTile];
        for (int i = 0; i < kPart; ++i)
          square[i] = load<F32x4>(sums_.data + t * kSize + (p * kPart + i) * kTile);
        transpose(square);
        for (int r = 0; r < kTile; ++r) {
          float* const to = totals + (t * kTile + r) * kLanes + p * kPart;
          store(to, load<F32x4>(to) + square[r]);
        }
      }
  }

 private:
  static constexpr int kSize = kLanes * kTile;

  // Kept apart: it would take registers from the loops around it.
  [[gnu::noinline]] void add_some(const Block& block, const Group& group, int64_t g,
                                  const F32x16& scale, const F32x16& zero, const float* x) {
    const int64_t column = g * (layout_.group_size + 1);
    SalientResidual* const next = residuals_.data + count_;
    const auto find =
        layout_.salient_mask == 127
            ? (layout_.uniform ? find_residuals<true, true> : find_residuals<true, false>)
            : (layout_.uniform ? find_residuals<false, true> : find_residuals<false, false>);
    find(layout_, block, group, scale, zero, column, next);
    count_ += layout_.salient_count;
    if (count_ >= kResiduals) multiply(x);
  }
  void multiply(const float* x) {
    const int64_t size = tile_size(layout_);
    for (int64_t t = 0; t < tiles_; ++t) {
      float* const sums = sums_.data + t * kSize;
      if (layout_.position_bytes == 1)
        add_residuals<uint8_t>(residuals_.data, count_, x + t * size, sums);
      else add_residuals<uint16_t>(residuals_.data, count_, x + t * size, sums);
    }
    count_ = 0;
  }

  const PackedLayout& layout_;
  const int64_t tiles_;
  int64_t count_ = 0;  // residuals that are decoded, not multiplied yet
  const Buffer<SalientResidual> residuals_;
  const Buffer<float> sums_;
};

}  // namespace
}  // namespace precalib
