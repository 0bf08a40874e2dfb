// Tens of rows of x in bfloat16: levels, which it holds exactly, with salient weights in units of the
// scale in their places; a group's products are scaled and added up. Takes less than to scale the
// weights, as `merge.h` does, where rows are few or groups large. Not for uniform levels, which have
// zero points.
#pragma once

#include "bfloats.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

// Bytes of the levels in bfloat16, and what writes them.
template <int kBits>
class Levels {
 public:
  explicit Levels(const Plan& plan)
      : plan_(plan), low_(bytes(plan, 0).data), high_(bytes(plan, 1).data), salient_(plan) {}

  // A group of a block to [2 * step + segment % 2][16 rows][segment / 2]; returns its scales.
  // One copy of it: more do not fit into the caches of instructions.
  [[gnu::noinline]] Floats write(const Block& block, int64_t index, uint16_t* to) {
    const Group group = find_group(plan_, block, index);
    fetch_side(plan_, group, 2);
    const Floats found = group_scales(plan_, block, group);
    const Ints none = found == 0;  // nothing but salient weights there, in units of one
    const Floats scale = (Floats)select(none, Ints{} + 0x3f800000, (Ints)found);
    const Floats inverse = (Floats)_mm512_rcp14_ps((__m512)scale);
    salient_.find(plan_, block, group, [=](Floats value) { return value * inverse; });
    const Table<kBits + 2> low_bytes = low_, high_bytes = high_;
    decode<kBits>(group.planes, group.chunks, 2 * plan_.block_bytes,
                  [&](int64_t step, Shorts at, auto) {
                    const Shorts low = (Shorts)low_bytes.find(at);
                    const Shorts high = (Shorts)high_bytes.find(at);
                    uint16_t* const out = to + 4 * step * kLanes;
                    store(out, select(Shorts{} + 0xff, low, high << 8));
                    store(out + 2 * kLanes, select(Shorts{} + 0xff, low >> 8, high));
                  });
    if (_mm512_movepi32_mask((__m512i)none))
      for (int64_t at = 0; at < group.columns * kLanes; at += 2 * kLanes)
        store(to + at, load<Ints>(to + at) & ~none);
    salient_.put(to);
    return scale;
  }

 private:
  struct Bytes128 {
    int8_t data[128];
  };
  static Bytes128 bytes(const Plan& plan, int which) {
    Bytes128 out;
    for (int i = 0; i < 128; ++i) {
      const float level = plan.levels[i];
      out.data[i] = int8_t(load<uint32_t>(&level) >> (16 + 8 * which));
    }
    return out;
  }

  const Plan& plan_;
  const Table<kBits + 2> low_, high_;
  Replacements salient_;
};

// totals[block][row] += the group's sums, scaled. One tile of rows after the other.
template <int kBlocks>
inline void add_scaled(const Floats* scales, const float* sums, int64_t rows, float* totals) {
  for (int b = 0; b < kBlocks; ++b) {
    const Floats scale = scales[b];
    const float* const from = sums + b * kTile * kLanes;
    float* const to = totals + b * kTile * kLanes;
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r)
      store(to + r * kLanes,
            load<Floats>(to + r * kLanes) + load<Floats>(from + r * kLanes) * scale);
  }
}

// One group of a share.
template <int kBits, int kBlocks>
inline void level_group(const Plan& plan, Levels<kBits>& levels, const Share& share, int64_t index,
                        int64_t rows, int64_t padded, uint16_t* weights) {
  const int64_t first = index * plan.group_size;
  const int64_t columns = smaller(plan.group_size, plan.columns - first);
  const int64_t stride = columns * kLanes;
  Floats scales[kBlocks];
  for (int b = 0; b < kBlocks; ++b)
    scales[b] = levels.write(share.blocks[b], index, weights + b * stride);
  const auto multiply = [&]<int kRowTiles>(int64_t tile) {
    alignas(64) float sums[kRowTiles * kBlocks * kTile * kLanes];
    multiply_pairs<kRowTiles, kBlocks>(share.x + first * padded + tile * kTile * columns,
                                       kTile * columns, weights, stride, columns / kPairColumns,
                                       true, sums, [] {});
    store_pairs<kRowTiles, kBlocks>(sums);
    for (int64_t t = 0; t < kRowTiles; ++t)
      add_scaled<kBlocks>(scales, sums + t * kBlocks * kTile * kLanes,
                          smaller(kTile, rows - (tile + t) * kTile),
                          share.totals + (tile + t) * kBlocks * kTile * kLanes);
  };
  int64_t tile = 0;
  for (; (tile + 2) * kTile <= padded; tile += 2) multiply.template operator()<2>(tile);
  if (tile * kTile < padded) multiply.template operator()<1>(tile);
}

// All products of some shares. weights: [2][group_size * 16], for use in here. To write a group while
// the one before is multiplied takes twice the memory, and longer.
template <int kBits>
void level_shares(const Plan& plan, const Share* shares, int64_t count, int64_t rows,
                  int64_t padded, uint16_t* weights) {
  Levels<kBits> levels(plan);
  for (int64_t i = 0; i < count; ++i)
    std::memset(shares[i].totals, 0, size_t(padded * shares[i].count * kLanes) * sizeof(float));
  for (int64_t g = 0; g < plan.groups; ++g)
    for (int64_t i = 0; i < count; ++i) {
      if (shares[i].count == 2)
        level_group<kBits, 2>(plan, levels, shares[i], g, rows, padded, weights);
      else level_group<kBits, 1>(plan, levels, shares[i], g, rows, padded, weights);
    }
}

}  // namespace
}  // namespace precalib

#endif
