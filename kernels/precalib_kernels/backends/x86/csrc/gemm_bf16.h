// Products in bfloat16 by AMX tiles or VDPBF16PS, of x and of what becomes of weights.
#pragma once

#include "amx_tiles.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kPairColumns = 32;  // columns in a tile of bfloat16
constexpr int kPairTile = kTile * kPairColumns;

inline int64_t padded_rows(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

// Sixteen bits of each of 32 columns of a group, [segment][8 steps] from `from` on. Tiles of weights
// have the second and third segment in each other's place, and so has this.
inline __m512i gather_columns(const uint16_t* from, int64_t segment) {
  __m512i v = _mm512_castsi128_si512(load<__m128i>(from));
  v = _mm512_inserti32x4(v, load<__m128i>(from + 2 * segment), 1);
  v = _mm512_inserti32x4(v, load<__m128i>(from + segment), 2);
  return _mm512_inserti32x4(v, load<__m128i>(from + 3 * segment), 3);
}

// What is at the even places of 32, then at the odd ones.
constexpr Shorts kEvenOdd = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// use(k, segment length, first column) for each 32 columns: k in the order of tiles, columns as they
// are in a row.
template <class Use>
inline void for_tile_columns(const Plan& plan, int64_t first, int64_t end, Use&& use) {
  for (; first < end; first += plan.group_size) {
    const int64_t segment = smaller(plan.group_size, plan.columns - first) / 4;
    for (int64_t t = 0; t < segment; t += kPairColumns / 4)
      use(first + 4 * t, segment, first + t);
  }
}

// Column scales in the order of tiles, of each 32 those at even places first.
inline void arrange_scales(const Plan& plan, const uint16_t* scales, float* out) {
  for_tile_columns(plan, 0, plan.columns, [&](int64_t k, int64_t segment, int64_t column) {
    const Shorts parted = (Shorts)_mm512_permutexvar_epi16(
        (__m512i)kEvenOdd, gather_columns(scales + column, segment));
    store(out + k, floats_of_halves(&parted));
    store(out + k + kLanes, floats_of_halves((const uint16_t*)&parted + kLanes));
  });
}

// One row of x, times what `arrange_scales` made, into tiles [span][tile of rows][32 columns' tile]
// [16][32]; `rows` in all.
inline void to_spans(const Plan& plan, int64_t span, const uint16_t* x, const float* scales,
                     int64_t row, int64_t rows, uint16_t* tiles) {
  // [segment][8 steps], evens before odds, to [8 steps][segment]
  constexpr Shorts kOrder = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                             2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  for (int64_t first = 0; first < plan.columns; first += span) {
    const int64_t end = smaller(first + span, plan.columns);
    uint16_t* const to = tiles + first * padded_rows(rows) + row / kTile * kTile * (end - first) +
                         row % kTile * kPairColumns - first * kTile;
    for_tile_columns(plan, first, end, [&](int64_t k, int64_t segment, int64_t column) {
      __m512i v = gather_columns(x + column, segment);
      if (scales) {
        const Floats even = (Floats)((Words)v << 16) * load<Floats>(scales + k);
        const Floats odd = (Floats)((Words)v & 0xffff0000u) * load<Floats>(scales + k + kLanes);
        v = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      } else {
        v = _mm512_permutexvar_epi16((__m512i)kEvenOdd, v);
      }
      store(to + k * kTile, _mm512_permutexvar_epi16((__m512i)kOrder, v));
    });
  }
}

// Levels in bfloat16, which holds them exactly, by index.
template <int kBits>
class BfloatLevels {
 public:
  explicit BfloatLevels(const Plan& plan) : low_(table(plan, 0)), high_(table(plan, 1)) {}

  // Of a step: in each row's lane the levels of the first and third segment, and of the others.
  std::pair<Shorts, Shorts> find(Shorts index) const {
    const Shorts low = (Shorts)low_.find(index), high = (Shorts)high_.find(index);
    return {select(Shorts{} + 0xff, low, high << 8), select(Shorts{} + 0xff, low >> 8, high)};
  }

 private:
  static Table<kBits + 2> table(const Plan& plan, int byte) {
    int8_t bytes[128];
    for (int i = 0; i < 128; ++i) {
      const float level = plan.levels[i];
      bytes[i] = int8_t(load<uint32_t>(&level) >> (16 + 8 * byte));
    }
    return Table<kBits + 2>(bytes);
  }
  Table<kBits + 2> low_, high_;
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

// use(how many, first) for all tiles of rows, two at a time and what is left.
template <class Use>
inline void for_row_tiles(int64_t rows, Use&& use) {
  const int64_t count = padded_rows(rows) / kTile;
  int64_t tile = 0;
  for (; tile + 2 <= count; tile += 2) use(std::integral_constant<int, 2>{}, tile);
  if (tile < count) use(std::integral_constant<int, 1>{}, tile);
}

#if defined(__AMX_BF16__)

// The tile two steps along the columns into the first cache: processors do not see ahead in tiles.
template <bool kFetch>
inline void fetch_ahead(const uint16_t* tile) {
  if constexpr (kFetch)
#pragma GCC unroll 16
    for (int row = 0; row < kTile; ++row)
      fetch((const uint8_t*)(tile + 2 * kPairTile + row * kPairColumns));
}

// `rows` of x or more, that of whole tiles. sums: [tile of rows][kBlocks][16][16], added to unless
// this is the first span. kFetch: all tiles of a span do not fit into the first cache.
// step(multiply) is called for each 32 columns, to call multiply(after), which calls after(i) behind
// the i-th product of tiles: what that does overlaps with them.
template <int kRowTiles, int kBlocks, bool kFetch, class Step>
inline void multiply_pairs(const uint16_t* x, int64_t tile_stride, const uint16_t* weights,
                           int64_t stride, int64_t count, int64_t, bool first, float* sums,
                           Step&& step) {
  constexpr int kBelow = kBlocks * 256;  // from a tile of rows to the next
  in_order();
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
  for (int64_t t = 0; t < count; ++t, x += kPairTile, weights += kPairTile)
    step([&](auto&& after) __attribute__((always_inline)) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, weights, 64);
      _tile_dpbf16ps(0, 4, 6);
      fetch_ahead<kFetch>(x);
      fetch_ahead<kFetch>(weights);
      after(std::integral_constant<int, 0>{});
      if constexpr (kBlocks > 1) {
        _tile_loadd(7, weights + stride, 64);
        _tile_dpbf16ps(1, 4, 7);
        fetch_ahead<kFetch>(weights + stride);
        after(std::integral_constant<int, 1>{});
      }
      if constexpr (kRowTiles > 1) {
        _tile_loadd(5, x + tile_stride, 64);
        _tile_dpbf16ps(2, 5, 6);
        fetch_ahead<kFetch>(x + tile_stride);
        after(std::integral_constant<int, kBlocks>{});
        if constexpr (kBlocks > 1) {
          _tile_dpbf16ps(3, 5, 7);
          after(std::integral_constant<int, 3>{});
        }
      }
    });
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

// kRows rows of x times kBlocks blocks: so many sums hide latency, and each input and each weight is
// loaded once for several of them.
template <int kRows, int kBlocks>
inline void multiply_rows(const uint16_t* x, const uint16_t* weights, int64_t stride, int64_t count,
                          bool first, float* sums) {
  Floats sum[kBlocks][kRows] = {};
  if (!first)
    for (int b = 0; b < kBlocks; ++b)
      for (int r = 0; r < kRows; ++r) sum[b][r] = load<Floats>(sums + (b * kTile + r) * kLanes);
  for (int64_t t = 0; t < count; ++t, x += kPairTile, weights += kPairTile)
    for (int pair = 0; pair < kPairColumns / 2; ++pair) {
      __m512bh both[kBlocks];
      for (int b = 0; b < kBlocks; ++b)
        both[b] = (__m512bh)load<__m512i>(weights + b * stride + pair * 2 * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const __m512bh inputs =
            (__m512bh)_mm512_set1_epi32(load<int32_t>(x + r * kPairColumns + 2 * pair));
        for (int b = 0; b < kBlocks; ++b)
          sum[b][r] = (Floats)_mm512_dpbf16_ps((__m512)sum[b][r], inputs, both[b]);
      }
    }
  for (int b = 0; b < kBlocks; ++b)
    for (int r = 0; r < kRows; ++r) store(sums + (b * kTile + r) * kLanes, sum[b][r]);
}

template <int kRowTiles, int kBlocks, bool kFetch, class Step>
inline void multiply_pairs(const uint16_t* x, int64_t tile_stride, const uint16_t* weights,
                           int64_t stride, int64_t count, int64_t rows, bool first, float* sums,
                           Step&&) {
  for (int tile = 0; tile < kRowTiles; ++tile, rows -= kTile)
    for (int row = 0; row < kTile && row < rows; row += 8) {
      const uint16_t* const from = x + tile * tile_stride + row * kPairColumns;
      float* const to = sums + (tile * kBlocks * kTile + row) * kLanes;
      if (rows - row > 4) multiply_rows<8, kBlocks>(from, weights, stride, count, first, to);
      else multiply_rows<4, kBlocks>(from, weights, stride, count, first, to);
    }
}

template <int kRowTiles, int kBlocks>
inline void store_pairs(float*) {}

#endif

}  // namespace
}  // namespace precalib

#endif
