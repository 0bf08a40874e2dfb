// Tens of rows of x: exact integer sums of levels times inputs in fixed point, by AMX or VPDPBUSD,
// scaled group by group; salient weights are added from float32 inputs that lie column by column.
#pragma once

#include "fixed.h"
#include "tiles.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int kByteColumns = 64;                  // columns in a tile of bytes
constexpr int kByteTile = kTile * kByteColumns;
#if defined(__AMX_INT8__)
constexpr int kLevelShift = 0;
#else
constexpr int kLevelShift = 128;  // VPDPBUSD takes unsigned levels; sums start at what that adds
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
  const Ints down = kLaneNumbers * int32_t(plan.group_size);
  if (plan.salient_count)
    for (int64_t k = 0; k < count; ++k)
      store(out.columns + (first + k) * kTile, look_up(x + k, down));
}

#if defined(__AMX_INT8__)

// Sums stay in tiles; two blocks share the tiles of two digits. meanwhile() is called for each
// product of tiles: what it does overlaps with them.
template <int kDigits, int kBlocks, class Work>
inline void multiply_digits(const int8_t* x, const uint8_t* levels, int64_t stride, int64_t count,
                            int64_t, const int32_t*, int32_t*, Work&& meanwhile) {
  static_assert(kDigits == 2 || (kDigits == 3 && kBlocks == 1));
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kDigits * kBlocks > 2) _tile_zero(2);
  if constexpr (kDigits * kBlocks > 3) _tile_zero(3);
  for (int64_t t = 0; t < count; ++t, x += kDigits * kByteTile, levels += kByteTile) {
    _tile_loadd(6, levels, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbssd(0, 4, 6);
    meanwhile();
    _tile_loadd(5, x + kByteTile, 64);
    _tile_dpbssd(1, 5, 6);
    meanwhile();
    if constexpr (kDigits == 3) {
      _tile_loadd(3, x + 2 * kByteTile, 64);
      _tile_dpbssd(2, 3, 6);
      meanwhile();
    } else if constexpr (kBlocks == 2) {
      _tile_loadd(7, levels + stride, 64);
      _tile_dpbssd(2, 4, 7);
      meanwhile();
      _tile_dpbssd(3, 5, 7);
      meanwhile();
    }
  }
}

// sums: [block][digit][row][16].
template <int kDigits, int kBlocks>
inline void store_digits(int32_t* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (kDigits * kBlocks > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (kDigits * kBlocks > 3) _tile_stored(3, sums + 768, 64);
}

#else

template <int kDigits, int kBlocks, class Work>
inline void multiply_digits(const int8_t* x, const uint8_t* levels, int64_t stride, int64_t count,
                            int64_t rows, const int32_t* starts, int32_t* sums, Work&& meanwhile) {
  for (int64_t t = 0; t < count * kDigits * kBlocks; ++t) meanwhile();
  constexpr int kAtOnce = 8;
  for (int b = 0; b < kBlocks; ++b)
    for (int d = 0; d < kDigits; ++d)
      for (int64_t first = 0; first < rows; first += kAtOnce) {
        Ints sum[kAtOnce];
        for (int r = 0; r < kAtOnce; ++r) sum[r] = Ints{} + starts[d * kTile + first + r];
        for (int64_t t = 0; t < count; ++t)
          for (int step = 0; step < kTile; ++step) {
            const __m512i weights = load<__m512i>(levels + b * stride + t * kByteTile + step * 64);
            const int8_t* const from =
                x + (t * kDigits + d) * kByteTile + first * kByteColumns + 4 * step;
            for (int r = 0; r < kAtOnce; ++r)
              sum[r] = (Ints)_mm512_dpbusd_epi32(
                  (__m512i)sum[r], weights,
                  _mm512_set1_epi32(load<int32_t>(from + r * kByteColumns)));
          }
        for (int r = 0; r < kAtOnce; ++r)
          store(sums + ((b * kDigits + d) * kTile + first + r) * kLanes, sum[r]);
      }
}

template <int kDigits, int kBlocks>
inline void store_digits(int32_t*) {}

#endif

// A salient weight of each row of a block.
struct Change {
  alignas(64) float by[kLanes];       // what it differs by from the base weight in its place
  alignas(64) int32_t at[kLanes];     // its column's beginning in Digits::columns
};

// The salient weights of some groups. A pass of its own: what is read back at once takes longer.
template <int kBits>
inline void find_changes(const Plan& plan, const Block& block, const Table<kBits + 2>& table,
                         int64_t first_group, int64_t last_group, Change* changes) {
  for (int64_t g = first_group; g < last_group; ++g) {
    const Group group = find_group(plan, block, g);
    const Floats scale = group_scales(plan, block, group);
    const Floats zero = group_zeros(plan, group);
    for (int64_t j = 0; j < plan.salient_count; ++j, ++changes) {
      const Salient salient = find_salient<kBits>(plan, block, group, table, j);
      const Floats base = (salient.level - zero) * scale;
      store(changes->by, (Ints)(salient.value - base) & salient.used);
      store(changes->at, (salient.position + int32_t(group.first)) * kTile);
    }
  }
}

// columns: of sixteen rows of x; sums: [row of the block][row of x], added to.
inline void add_changes(const Change* changes, int64_t count, const float* columns, float* sums) {
  [&]<int... lane>(std::integer_sequence<int, lane...>) {
    Floats sum[kLanes] = {load<Floats>(sums + lane * kTile)...};
    for (int64_t i = 0; i < count; ++i)
      ((sum[lane] += changes[i].by[lane] * load<Floats>(columns + changes[i].at[lane])), ...);
    (store(sums + lane * kTile, sum[lane]), ...);
  }(std::make_integer_sequence<int, kLanes>{});
}

// totals: [row of x][row of the block] += the above, turned.
inline void add_turned(const float* sums, int64_t rows, float* totals) {
  const Ints down = kLaneNumbers * kTile;
  for (int64_t r = 0; r < rows; ++r)
    store(totals + r * kLanes, load<Floats>(totals + r * kLanes) + look_up(sums + r, down));
}

// Scales and zero points of a group of a pair of blocks.
template <int kBlocks>
struct Scales {
  Floats scale[kBlocks], zero[kBlocks];
};

// The levels of a group of a pair of blocks, a chunk at a time.
template <int kBits, int kBlocks>
class Levels {
 public:
  Levels(const Plan& plan, const Block* blocks)
      : plan_(plan), blocks_(blocks), table_(shifted_levels<kBits>(plan, kLevelShift)),
        stride_(byte_tiles(smaller(plan.group_size, plan.columns)) * kByteTile) {}
  int64_t stride() const { return stride_; }

  // to: [kBlocks][tiles][16][64].
  void begin(int64_t group, uint8_t* to) {
    for (int b = 0; b < kBlocks; ++b) {
      groups_[b] = find_group(plan_, blocks_[b], group);
      // salient weights, for the pass to come, and the next pair's scales
      for (int64_t at = 0; at < plan_.side_bytes; at += 64)
        fetch(groups_[b].scales + 2 * plan_.groups * plan_.side_bytes + at);
    }
    to_ = to;
    block_ = chunk_ = 0;
    if (groups_[0].columns % kByteColumns)
      for (int b = 0; b < kBlocks; ++b)
        std::memset(to + b * stride_ + groups_[0].columns * kLanes, 0, kByteTile / 2);
  }
  int64_t left() const { return (kBlocks - block_) * groups_[0].chunks - chunk_; }
  void advance() {
    const Group& group = groups_[block_];
    uint8_t* const to = to_ + block_ * stride_;
    decode_chunk<kBits>(group.planes, group.chunks, chunk_, 2 * plan_.block_bytes,
                        [&](int64_t step, Shorts index, auto) {
                          store(to + step * kVector, table_.find(index));
                        });
    if (++chunk_ == group.chunks) {
      chunk_ = 0;
      ++block_;
    }
  }
  Scales<kBlocks> scales() const {
    Scales<kBlocks> out;
    for (int b = 0; b < kBlocks; ++b) {
      out.scale[b] = group_scales(plan_, blocks_[b], groups_[b]);
      out.zero[b] = group_zeros(plan_, groups_[b]);
    }
    return out;
  }

 private:
  const Plan& plan_;
  const Block* blocks_;
  Table<kBits + 2> table_;
  int64_t stride_, block_ = 0, chunk_ = 0;
  Group groups_[kBlocks];
  uint8_t* to_ = nullptr;
};

// totals[block][row] += the group's sums, scaled.
template <int kDigits, int kBlocks>
inline void scale_sums(const Plan& plan, const Scales<kBlocks>& by, const Digits& x, int64_t group,
                       int64_t rows, const int32_t* sums, float* totals) {
  const float* const units = x.units + group * kTile;
  const float* const digit_totals = x.totals + group * kTile;
  for (int b = 0; b < kBlocks; ++b)
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const from = sums + (b * kDigits * kTile + r) * kLanes;
      float* const to = totals + (b * kTile + r) * kLanes;
      Floats dot = to_floats(load<Ints>(from));
      for (int d = 1; d < kDigits; ++d)
        dot = dot * 256 + to_floats(load<Ints>(from + d * kTile * kLanes));
      if (plan.uniform) dot -= by.zero[b] * digit_totals[r];
      store(to, load<Floats>(to) + dot * (by.scale[b] * units[r]));
    }
}

// x: of each sixteen rows; levels: [2][kBlocks][tiles of a group][16][64], for use in here;
// totals: [tile of rows][kBlocks][16][16], cleared here. While a group is multiplied, the next
// one's levels are unpacked and the sums of the one before are scaled.
template <int kBits, int kDigits, int kBlocks>
void digit_blocks(const Plan& plan, const Block* blocks, const Digits* x, int64_t rows,
                  uint8_t* levels, float* totals) {
  constexpr int kSums = kBlocks * kDigits * kTile * kLanes;
  const int64_t row_tiles = (rows + kTile - 1) / kTile;
  std::memset(totals, 0, size_t(row_tiles * kBlocks * kTile * kLanes) * 4);
  alignas(64) int32_t sums[2][kSums];
  Levels<kBits, kBlocks> unpack(plan, blocks);
  const int64_t stride = unpack.stride(), tile_step = stride / kByteTile * kDigits * kByteTile;
  Scales<kBlocks> scales[2];
  const auto rows_of = [&](int64_t tile) { return smaller(kTile, rows - tile * kTile); };
  const auto scale = [&](int64_t i) {  // the i-th product of a group and a tile of rows
    const int64_t group = i / row_tiles, tile = i % row_tiles;
    scale_sums<kDigits, kBlocks>(plan, scales[group % 2], x[tile], group, rows_of(tile), sums[i % 2],
                                 totals + tile * kBlocks * kTile * kLanes);
  };
  unpack.begin(0, levels);
  while (unpack.left()) unpack.advance();
  int64_t i = 0;
  for (int64_t g = 0; g < plan.groups; ++g) {
    const uint8_t* const now = levels + g % 2 * kBlocks * stride;
    const int64_t count = byte_tiles(smaller(plan.group_size, plan.columns - g * plan.group_size));
    scales[g % 2] = unpack.scales();
    if (g + 1 < plan.groups) unpack.begin(g + 1, levels + (g + 1) % 2 * kBlocks * stride);
    const int64_t pieces = unpack.left(), products = count * row_tiles * kDigits * kBlocks;
    int64_t due = 0;
    const auto meanwhile = [&] {  // as evenly as it goes
      for (due += pieces; due >= products; due -= products) unpack.advance();
    };
    for (int64_t t = 0; t < row_tiles; ++t, ++i) {
      multiply_digits<kDigits, kBlocks>(x[t].tiles + g * tile_step, now, stride, count, rows_of(t),
                                        x[t].starts + g * kDigits * kTile, sums[i % 2], meanwhile);
      if (i) scale(i - 1);
      store_digits<kDigits, kBlocks>(sums[i % 2]);
    }
  }
  scale(i - 1);
}

}  // namespace
}  // namespace precalib

#endif
