// Products in bfloat16 by AMX tiles or VDPBF16PS, of whatever `merge.h` or `levels.h` makes of weights.
#pragma once

#include "plain.h"
#include "tiles.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kPairColumns = 32;  // columns in a tile of bfloat16
constexpr int kPairTile = kTile * kPairColumns;

// One row of x into tiles [span][tile of rows][32 columns' tile][16][32]; `padded` rows in all. Of
// each four columns the second and third change places, as in the tiles of weights.
inline void to_spans(const Plan& plan, int64_t span, const float* x, int64_t row, int64_t padded,
                     uint16_t* tiles) {
  for (int64_t first = 0; first < plan.columns; first += span) {
    const int64_t count = smaller(span, plan.columns - first);
    uint16_t* const to =
        tiles + first * padded + row / kTile * kTile * count + row % kTile * kPairColumns;
    for (int64_t k = 0; k < count; k += kLanes)
      store(to + k / kPairColumns * kPairTile + k % kPairColumns,
            to_bfloats((Floats)_mm512_permute_ps(load<__m512>(x + first + k), 0xd8)));
  }
}

// A pair of blocks or one block, all rows of x in the tiles of its part, and its sums.
struct Share {
  const Block* blocks;
  int count;
  const uint16_t* x;
  float* totals;  // [tile of rows][count][16][16]
};

// The salient weights of a group of a block, on their way to their places among the others.
class Replacements {
 public:
  explicit Replacements(const Plan& plan) : count_(plan.salient_count), all_(plan.salient_count) {}

  // Long before they are put where they are read, which takes longer at once.
  // value(Floats): what is to be written for a salient weight.
  template <class Value>
  void find(const Plan& plan, const Block& block, const Group& group, Value&& value) {
    // Of four steps: position 4 * step + segment is at 2 * step + segment % 2, [row][segment / 2].
    constexpr Ints kPlaces = {0,   32,  1,   33,  64,  96,  65,  97,
                              128, 160, 129, 161, 192, 224, 193, 225};
    for (int64_t j = 0; j < count_; ++j) {
      const Salient salient = find_salient(plan, block, group, j);
      One& one = all_.data[j];
      store(one.value, to_bfloats(value(salient.value)));
      const Ints low = (Ints)_mm512_permutexvar_epi32((__m512i)salient.position, (__m512i)kPlaces);
      store(one.place, select(Ints{} + ~255, salient.position << 4, low));
      one.used = unsigned(_mm512_movepi32_mask((__m512i)salient.used));
    }
  }

  void put(uint16_t* to) const {
    for (int64_t j = 0; j < count_; ++j) {
      const One& one = all_.data[j];
      if (one.used == 0xffff) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) to[one.place[row] + 2 * row] = one.value[row];
      } else {
        for (unsigned used = one.used; used; used &= used - 1) {
          const int row = __builtin_ctz(used);
          to[one.place[row] + 2 * row] = one.value[row];
        }
      }
    }
  }

 private:
  struct One {
    alignas(32) uint16_t value[kLanes];
    alignas(64) int32_t place[kLanes];  // of row 0
    unsigned used;                      // rows
  };
  const int64_t count_;
  Buffer<One> all_;
};

#if defined(__AMX_BF16__)

// sums: [tile of rows][kBlocks][16][16], added to unless this is the first span.
// meanwhile() is called for each product of tiles: what it does overlaps with them.
template <int kRowTiles, int kBlocks, class Work>
inline void multiply_pairs(const uint16_t* x, int64_t tile_stride, const uint16_t* weights,
                           int64_t stride, int64_t count, bool first, float* sums,
                           Work&& meanwhile) {
  constexpr int kBelow = kBlocks * 256;  // from a tile of rows to the next
  written();
  if (first) {
    _tile_zero(0);
    if constexpr (kBlocks > 1) _tile_zero(1);
    if constexpr (kRowTiles > 1) _tile_zero(2);
    if constexpr (kRowTiles > 1 && kBlocks > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if constexpr (kBlocks > 1) _tile_loadd(1, sums + 256, 64);
    if constexpr (kRowTiles > 1) _tile_loadd(2, sums + kBelow, 64);
    if constexpr (kRowTiles > 1 && kBlocks > 1) _tile_loadd(3, sums + kBelow + 256, 64);
  }
  for (int64_t t = 0; t < count; ++t) {
    _tile_loadd(4, x + t * kPairTile, 64);
    _tile_loadd(6, weights + t * kPairTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    meanwhile();
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, weights + stride + t * kPairTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      meanwhile();
    }
    if constexpr (kRowTiles > 1) {
      _tile_loadd(5, x + tile_stride + t * kPairTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      meanwhile();
      if constexpr (kBlocks > 1) {
        _tile_dpbf16ps(3, 5, 7);
        meanwhile();
      }
    }
  }
}

// To where the tiles' sums belong.
template <int kRowTiles, int kBlocks>
inline void store_pairs(float* sums) {
  constexpr int kBelow = kBlocks * 256;
  _tile_stored(0, sums, 64);
  if constexpr (kBlocks > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (kRowTiles > 1) _tile_stored(2, sums + kBelow, 64);
  if constexpr (kRowTiles > 1 && kBlocks > 1) _tile_stored(3, sums + kBelow + 256, 64);
}

#else

template <int kRowTiles, int kBlocks, class Work>
inline void multiply_pairs(const uint16_t* x, int64_t tile_stride, const uint16_t* weights,
                           int64_t stride, int64_t count, bool first, float* sums,
                           Work&& meanwhile) {
  constexpr int kAtOnce = kTile / 2;
  for (int64_t t = 0; t < count * kRowTiles * kBlocks; ++t) meanwhile();
  for (int i = 0; i < kRowTiles * 2 * kBlocks; ++i) {
    const int row_tile = i / (2 * kBlocks), block = i % kBlocks, half = i / kBlocks % 2;
    float* const to = sums + ((row_tile * kBlocks + block) * kTile + half * kAtOnce) * kLanes;
    Floats sum[kAtOnce] = {};
    if (!first)
      for (int r = 0; r < kAtOnce; ++r) sum[r] = load<Floats>(to + r * kLanes);
    for (int64_t t = 0; t < count; ++t)
      for (int pair = 0; pair < kPairColumns / 2; ++pair) {
        const __m512bh both = (__m512bh)load<__m512i>(weights + block * stride + t * kPairTile +
                                                      pair * 2 * kLanes);
        const uint16_t* const from = x + row_tile * tile_stride + t * kPairTile +
                                     half * kAtOnce * kPairColumns + 2 * pair;
        for (int r = 0; r < kAtOnce; ++r)
          sum[r] = (Floats)_mm512_dpbf16_ps(
              (__m512)sum[r],
              (__m512bh)_mm512_set1_epi32(load<int32_t>(from + r * kPairColumns)), both);
      }
    for (int r = 0; r < kAtOnce; ++r) store(to + r * kLanes, sum[r]);
  }
}

template <int kRowTiles, int kBlocks>
inline void store_pairs(float*) {}

#endif

}  // namespace
}  // namespace precalib

#endif
