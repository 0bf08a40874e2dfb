// Tens of rows of x: exact integer sums of levels times inputs in fixed point, by AMX or VPDPBUSD,
// scaled group by group; salient weights are added from float32 inputs that lie column by column.
#pragma once

#include "salient_residual.h"
#include "quantize_activations.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int kByteColumns = 64;                  // columns in a tile of bytes
constexpr int kByteTile = kTile * kByteColumns;
#if defined(__AMX_INT8__)
constexpr int kLevelShift = 0;
template <int kDigits>
constexpr int64_t kHeldRows = 0;
#else
constexpr int kLevelShift = 128;  // VPDPBUSD takes unsigned levels; sums start at what that adds
// Up to so many rows levels are multiplied where they are unpacked: sums and table fit into registers.
// With one digit that is a tile, and more rows are a tile after the other.
template <int kDigits>
constexpr int64_t kHeldRows = kDigits == 1 ? kTile : kDigits == 2 ? 8 : 6;
#endif

inline int64_t byte_tiles(int64_t columns) { return (columns + kByteColumns - 1) / kByteColumns; }

// Tiles of all groups: each group begins one.
inline int64_t byte_tiles(const Plan& plan) {
  const int64_t last = plan.columns - (plan.groups - 1) * plan.group_size;
  return (plan.groups - 1) * byte_tiles(plan.group_size) + byte_tiles(last);
}

// Sixteen rows of x, in memory that the caller owns.
struct Digits {
  int8_t* tiles;    // [tile][digit][row][64]
  float* units;     // [group][row]: value of the last digit's one
  float* totals;    // [group][row]: sum of the digits' values, in units
  int32_t* starts;  // [group][digit][row]: what sums begin with
  float* columns;   // [column][row]
};

// One group of sixteen rows of x into its place.
// x: [16][group_size] arranged, with zeros where there are no `rows`.
template <int kDigits>
void set_digits(const Plan& plan, const float* x, int64_t group, int64_t rows, const Digits& out) {
  const int64_t first = group * plan.group_size;
  const int64_t count = smaller(plan.group_size, plan.columns - first);
  int8_t* const tiles = out.tiles + group * byte_tiles(plan.group_size) * kDigits * kByteTile;
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = [&](int d, int64_t k) {
      return tiles + (k / kByteColumns * kDigits + d) * kByteTile + r * kByteColumns +
             k % kByteColumns;
    };
    const Fixed<kDigits> fixed = to_fixed<kDigits>(x + r * plan.group_size, count, at);
    out.units[group * kTile + r] = fixed.unit;
    out.totals[group * kTile + r] = fixed.total;
    for (int d = 0; d < kDigits; ++d)
      out.starts[(group * kDigits + d) * kTile + r] = kLevelShift / 128 * fixed.start[d];
  }
  if (plan.salient_count)
    for (int64_t k = 0; k < count; k += kTile) {
      Floats square[kTile];
      turn(x + k, plan.group_size, square);
      for (int r = 0; r < kTile; ++r) store(out.columns + (first + k + r) * kTile, square[r]);
    }
}

#if defined(__AMX_INT8__)

// Sums stay in tiles; two blocks share the tiles of two digits.
template <int kDigits, int kBlocks>
inline void multiply_digits(const int8_t* x, const uint8_t* levels, int64_t stride, int64_t count,
                            int64_t, const int32_t*, int32_t*) {
  static_assert(kDigits < 3 || kBlocks == 1);
  in_order();
  _tile_zero(0);
  if constexpr (kDigits * kBlocks > 1) _tile_zero(1);
  if constexpr (kDigits * kBlocks > 2) _tile_zero(2);
  if constexpr (kDigits * kBlocks > 3) _tile_zero(3);
  for (int64_t t = 0; t < count; ++t, x += kDigits * kByteTile, levels += kByteTile) {
    _tile_loadd(6, levels, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kDigits > 1) {
      _tile_loadd(5, x + kByteTile, 64);
      _tile_dpbssd(1, 5, 6);
    }
    if constexpr (kDigits > 2) {
      _tile_loadd(3, x + 2 * kByteTile, 64);
      _tile_dpbssd(2, 3, 6);
    }
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, levels + stride, 64);
      if constexpr (kDigits == 1) _tile_dpbssd(1, 4, 7);
      if constexpr (kDigits == 2) _tile_dpbssd(2, 4, 7);
      if constexpr (kDigits == 2) _tile_dpbssd(3, 5, 7);
    }
  }
}

// sums: [block][digit][row][16].
template <int kDigits, int kBlocks>
inline void store_digits(int32_t* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (kDigits * kBlocks > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (kDigits * kBlocks > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (kDigits * kBlocks > 3) _tile_stored(3, sums + 768, 64);
}

#else

template <int kDigits, int kBlocks>
inline void multiply_digits(const int8_t* x, const uint8_t* levels, int64_t stride, int64_t count,
                            int64_t rows, const int32_t* starts, int32_t* sums) {
  constexpr int kAtOnce = 8;
  for (int d = 0; d < kDigits; ++d)
    for (int64_t first = 0; first < rows; first += kAtOnce) {
      Ints sum[kBlocks][kAtOnce];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int r = 0; r < kAtOnce; ++r) sum[b][r] = Ints{} + starts[d * kTile + first + r];
      for (int64_t t = 0; t < count; ++t)
        for (int step = 0; step < kTile; ++step) {
          const int8_t* const from =
              x + (t * kDigits + d) * kByteTile + first * kByteColumns + 4 * step;
          __m512i weights[kBlocks];
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b)
            weights[b] = load<__m512i>(levels + b * stride + t * kByteTile + step * 64);
#pragma GCC unroll 16
          for (int r = 0; r < kAtOnce; ++r)
#pragma GCC unroll 16
            for (int b = 0; b < kBlocks; ++b)
              sum[b][r] = add_dots(sum[b][r], weights[b], from + r * kByteColumns);
        }
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int r = 0; r < kAtOnce; ++r)
          store(sums + ((b * kDigits + d) * kTile + first + r) * kLanes, sum[b][r]);
    }
}

template <int kDigits, int kBlocks>
inline void store_digits(int32_t*) {}

#endif

// Levels of one group of a pair of blocks to [kBlocks][tiles][16][64], `stride` bytes a block.
template <int kBits, int kBlocks>
inline void unpack_levels(const Plan& plan, const Block* blocks, int64_t index,
                          const Table<kBits + 2>& table, int64_t stride, uint8_t* to) {
  for (int b = 0; b < kBlocks; ++b, to += stride) {
    const Group group = find_group(plan, blocks[b], index);
    fetch_side(plan, group, 2);
    decode<kBits>(group.planes, group.chunks, 2 * plan.block_bytes,
                  [&](int64_t step, Shorts at, auto) { store(to + step * kVector, table.find(at)); });
    if (group.columns % kByteColumns) std::memset(to + group.columns * kLanes, 0, kByteTile / 2);
  }
}

// totals[block][row] += a group's sums, scaled.
template <int kDigits, int kBlocks>
inline void scale_sums(const Plan& plan, const Block* blocks, const Digits& x, int64_t index,
                       int64_t rows, const int32_t* sums, float* totals) {
  const float* const units = x.units + index * kTile;
  const float* const digit_totals = x.totals + index * kTile;
  for (int b = 0; b < kBlocks; ++b) {
    const Group group = find_group(plan, blocks[b], index);
    const Floats scale = group_scales(plan, blocks[b], group), zero = group_zeros(plan, group);
    const bool uniform = plan.uniform;
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const from = sums + (b * kDigits * kTile + r) * kLanes;
      float* const to = totals + (b * kTile + r) * kLanes;
      Floats dot = join_digits<kDigits>(
          [&](int d) { return load<Ints>(from + d * kTile * kLanes); });
      if (uniform) dot -= zero * digit_totals[r];
      store(to, load<Floats>(to) + dot * (scale * units[r]));
    }
  }
}

// A block times up to kRows rows; its levels stay in registers. totals: [kRows][16], added to.
template <int kBits, int kDigits, int kRows>
void digit_rows(const Plan& plan, const Block& block, const Digits& x,
                const Table<kBits + 2>& table, float* totals) {
  const int64_t stride = byte_tiles(plan.group_size) * kDigits * kByteTile;
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Group group = find_group(plan, block, g);
    fetch_side(plan, group, 1);
    const int32_t* const starts = x.starts + g * kDigits * kTile;
    Ints sum[kDigits][kRows];
#pragma GCC unroll 16
    for (int d = 0; d < kDigits; ++d)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[d][r] = Ints{} + starts[d * kTile + r];
    const int8_t* const tiles = x.tiles + g * stride;
    decode<kBits>(group.planes, group.chunks, plan.block_bytes, [&](int64_t step, Shorts at, auto) {
      const __m512i levels = (__m512i)table.find(at);
      const int8_t* const from = tiles + step / kTile * kDigits * kByteTile + step % kTile * 4;
#pragma GCC unroll 16
      for (int d = 0; d < kDigits; ++d)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          sum[d][r] = add_dots(sum[d][r], levels, from + d * kByteTile + r * kByteColumns);
    });
    const Floats scale = group_scales(plan, block, group), zero = group_zeros(plan, group);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats dot = join_digits<kDigits>([&](int d) { return sum[d][r]; }) -
                         zero * x.totals[g * kTile + r];
      float* const to = totals + r * kLanes;
      store(to, load<Floats>(to) + dot * (scale * x.units[g * kTile + r]));
    }
  }
}

// x: of each sixteen rows; levels: [kBlocks][tiles of a group][16][64], for use in here; totals:
// [tile of rows][kBlocks][16][16], cleared here. One step after the other: to unpack a group while
// the one before is multiplied takes twice the memory, and longer.
template <int kBits, int kDigits, int kBlocks>
void digit_blocks(const Plan& plan, const Block* blocks, const Digits* x, int64_t rows,
                  uint8_t* levels, float* totals) {
  const int64_t row_tiles = (rows + kTile - 1) / kTile;
  std::memset(totals, 0, size_t(row_tiles * kBlocks * kTile * kLanes) * 4);
  alignas(64) int32_t sums[kBlocks * kDigits * kTile * kLanes];
  const Table<kBits + 2> table = shifted_levels<kBits>(plan, kLevelShift);
  if constexpr (kHeldRows<kDigits> > 0) {
    constexpr int kMost = kHeldRows<kDigits>;
    if (rows <= kMost || kMost == kTile) {
      for (int b = 0; b < kBlocks; ++b)
        for (int64_t t = 0; t < row_tiles; ++t) {
          const auto multiply = [&]<int kRows>() {
            digit_rows<kBits, kDigits, kRows>(plan, blocks[b], x[t], table,
                                              totals + (t * kBlocks + b) * kTile * kLanes);
          };
          const int64_t there = rows - t * kTile;
          if (there <= 6) multiply.template operator()<6>();
          else if (there <= 8) multiply.template operator()<smaller(8, kMost)>();
          else if (there <= 12) multiply.template operator()<smaller(12, kMost)>();
          else multiply.template operator()<kMost>();
        }
      return;
    }
  }
  const int64_t stride = byte_tiles(smaller(plan.group_size, plan.columns)) * kByteTile;
  for (int64_t g = 0; g < plan.groups; ++g) {
    unpack_levels<kBits, kBlocks>(plan, blocks, g, table, stride, levels);
    const int64_t count = byte_tiles(smaller(plan.group_size, plan.columns - g * plan.group_size));
    for (int64_t t = 0; t < row_tiles; ++t) {
      const int64_t there = smaller(kTile, rows - t * kTile);
      multiply_digits<kDigits, kBlocks>(x[t].tiles + g * stride * kDigits, levels, stride, count,
                                        there, x[t].starts + g * kDigits * kTile, sums);
      store_digits<kDigits, kBlocks>(sums);
      scale_sums<kDigits, kBlocks>(plan, blocks, x[t], g, there, sums,
                                   totals + t * kBlocks * kTile * kLanes);
    }
  }
}

}  // namespace
}  // namespace precalib

#endif
