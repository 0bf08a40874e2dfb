// Many rows of x in bfloat16: a group's levels go to the first cache as bfloat16, which they all
// are exactly, and are multiplied by AMX tiles or VDPBF16PS; scales apply to the sums of the group.
// Salient weights take their places among the levels, in units of the scale and rounded.
#pragma once

#include "plain.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kTile = 16;        // rows of x in a tile
constexpr int kTileColumns = 32;  // columns in a tile
constexpr int kTileSize = kTile * kTileColumns;
constexpr float kAlmostZero = 0x1p-64f;  // for scales of zero, as salient weights are divided by it

// Exact bfloat16 of levels, by index.
template <int kBits>  // of an index
struct WideTable {
  static constexpr int kParts = kBits > 5 ? 1 << (kBits - 5) : 1;
  __m512i part[kParts];

  explicit WideTable(const int8_t* values) {
    for (int i = 0; i < kParts; ++i)
      for (int j = 0; j < 2; ++j) {
        const Halves half =
            to_bfloats(to_floats(ints_of_signed_bytes(values + 32 * i + 16 * j)));
        std::memcpy((char*)&part[i] + 32 * j, &half, 32);
      }
  }
  Shorts find(Shorts index) const {
    const __m512i at = (__m512i)index;
    if constexpr (kParts == 1) {
      return (Shorts)_mm512_permutexvar_epi16(at, part[0]);
    } else if constexpr (kParts == 2) {
      return (Shorts)_mm512_permutex2var_epi16(part[0], at, part[1]);
    } else {
      const __mmask32 upper = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
      return (Shorts)_mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(part[0], at, part[1]),
                                             _mm512_permutex2var_epi16(part[2], at, part[3]));
    }
  }
};

// One row of x into tiles [columns / 32][16][32]: columns 4t + s of a group in the order of s
// 0, 2, 1, 3, which is how `unpack_bfloats` pairs them.
inline void to_tiles(const Plan& plan, const float* x, int64_t row, uint16_t* tiles) {
  const Ints order = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  uint16_t* const to = tiles + row / kTile * kTile * plan.columns + row % kTile * kTileColumns;
  for (int64_t k = 0; k < plan.columns; k += kLanes) {
    const Floats values = __builtin_shuffle(load<Floats>(x + k), order);
    store(to + k / kTileColumns * kTileSize + k % kTileColumns, to_bfloats(values));
  }
}

// Sums of the inputs of each group as they are in the tiles.
inline void sum_groups(const Plan& plan, const float* x, float* sums) {
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t first = g * plan.group_size;
    Floats sum = {};
    for (int64_t k = first; k < smaller(first + plan.group_size, plan.columns); k += kLanes) {
      const Halves rounded = to_bfloats(load<Floats>(x + k));
      sum += floats_of_bfloats(&rounded);
    }
    sums[g] = _mm512_reduce_add_ps((__m512)sum);
  }
}

// levels: [2 * step + (segment & 1)][16 rows][segment >> 1] in bfloat16.
template <int kBits>
inline void unpack_bfloats(const Plan& plan, const Block& block, const Group& group, Floats scale,
                           Floats zero, const Table<kBits + 2>& table,
                           const WideTable<kBits + 2>& wide, uint16_t* levels) {
  decode<kBits>(group.planes, group.chunks, [&](int64_t step, Shorts index, auto) {
    store(levels + 2 * step * 2 * kLanes, wide.find(index));
    store(levels + (2 * step + 1) * 2 * kLanes, wide.find(index >> 8));
  });
  const Floats inverse = 1 / scale;
  for (int64_t j = 0; j < plan.salient_count; ++j) {
    const Salient salient = find_salient<kBits>(plan, block, group, table, j);
    const Halves value = to_bfloats(salient.value * inverse + zero);
    const Ints segment = salient.position & 3, step = salient.position >> 2;
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints at = ((2 * step + (segment & 1)) * kLanes + lane) * 2 + (segment >> 1);
    // Through memory: taking lanes out of a register one by one takes longer.
    alignas(64) uint16_t values[kLanes];
    alignas(64) int32_t places[kLanes];
    store(values, value);
    store(places, at);
    unsigned used = unsigned(_mm512_movepi32_mask((__m512i)salient.used));
    if (used == 0xffff) {
      for (int l = 0; l < kLanes; ++l) levels[places[l]] = values[l];
    } else {
      for (; used; used &= used - 1) {
        const int l = __builtin_ctz(used);
        levels[places[l]] = values[l];
      }
    }
  }
}

#if defined(__AMX_BF16__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums [2 of x][2 of blocks]; 4, 5: x; 6, 7: levels. They belong to the thread: what
// another library may have set up is put back.
class Tiles {
 public:
  explicit Tiles(int64_t rows_of_x) {
    _tile_storeconfig(&before_);
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = uint8_t(t < 6 ? smaller(rows_of_x, kTile) : kTile);
      config.bytes[t] = 64;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette) _tile_loadconfig(&before_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  TileConfig before_;
};

template <int kRowTiles, int kBlocks>
inline void multiply_tiles(const uint16_t* x, int64_t tile_stride, const uint16_t* levels,
                           int64_t levels_stride, int64_t count, float* out) {
  _tile_zero(0);
  if constexpr (kBlocks > 1) _tile_zero(1);
  if constexpr (kRowTiles > 1) _tile_zero(2);
  if constexpr (kRowTiles > 1 && kBlocks > 1) _tile_zero(3);
  for (int64_t t = 0; t < count; ++t) {
    _tile_loadd(4, x + t * kTileSize, 64);
    _tile_loadd(6, levels + t * kTileSize, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, levels + levels_stride + t * kTileSize, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles > 1) {
      _tile_loadd(5, x + tile_stride + t * kTileSize, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBlocks > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 64);
  if constexpr (kBlocks > 1) _tile_stored(1, out + 256, 64);
  if constexpr (kRowTiles > 1) _tile_stored(2, out + 512, 64);
  if constexpr (kRowTiles > 1 && kBlocks > 1) _tile_stored(3, out + 768, 64);
}

#else

class Tiles {
 public:
  explicit Tiles(int64_t) {}
};

template <int kRowTiles, int kBlocks>
inline void multiply_tiles(const uint16_t* x, int64_t tile_stride, const uint16_t* levels,
                           int64_t levels_stride, int64_t count, float* out) {
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
    for (int half = 0; half < 2; ++half)
      for (int b = 0; b < kBlocks; ++b) {
        Floats sum[kTile / 2] = {};
        for (int64_t t = 0; t < count; ++t)
          for (int pair = 0; pair < kTileColumns / 2; ++pair) {
            const __m512bh weights = (__m512bh)load<__m512i>(
                levels + b * levels_stride + t * kTileSize + pair * 2 * kLanes);
            for (int r = 0; r < kTile / 2; ++r) {
              const uint16_t* const from = x + row_tile * tile_stride + t * kTileSize +
                                           (half * kTile / 2 + r) * kTileColumns + 2 * pair;
              sum[r] = (Floats)_mm512_dpbf16_ps(
                  (__m512)sum[r], (__m512bh)_mm512_set1_epi32(load<int32_t>(from)), weights);
            }
          }
        for (int r = 0; r < kTile / 2; ++r)
          store(out + ((row_tile * 2 + b) * kTile + half * kTile / 2 + r) * kLanes, sum[r]);
      }
}

#endif

// x: tiles of `rows` rows; row_sums: [rows][groups] of x, needed for zero points only;
// levels: [2][group_size * 16]; totals: [2][rows to whole tiles][16], cleared here.
template <int kBits, int kBlocks>
void tile_blocks(const Plan& plan, const Block* blocks, const uint16_t* x, const float* row_sums,
                 int64_t rows, uint16_t* levels, float* totals) {
  const Table<kBits + 2> table(plan.levels);
  const WideTable<kBits + 2> wide(plan.levels);
  const int64_t row_tiles = (rows + kTile - 1) / kTile, padded = row_tiles * kTile;
  const int64_t stride = smaller(plan.group_size, plan.columns) * kLanes;
  std::memset(totals, 0, size_t(2 * padded * kLanes) * 4);
  alignas(64) float sums[4 * kTile * kLanes];
  for (int64_t g = 0; g < plan.groups; ++g) {
    Floats scale[kBlocks], zero[kBlocks];
    Group group;
    for (int b = 0; b < kBlocks; ++b) {
      group = find_group(plan, blocks[b], g);
      scale[b] = group_scales(plan, blocks[b], group);
      scale[b] = scale[b] == 0 ? Floats{} + kAlmostZero : scale[b];
      zero[b] = plan.uniform ? floats_of_bytes(group.zeros) : Floats{};
      unpack_bfloats<kBits>(plan, blocks[b], group, scale[b], zero[b], table, wide,
                            levels + b * stride);
    }
    const auto add = [&](int64_t tile, int tiles) {
      for (int t = 0; t < tiles; ++t)
        for (int b = 0; b < kBlocks; ++b)
          for (int64_t r = 0; r < smaller(kTile, rows - (tile + t) * kTile); ++r) {
            const int64_t row = (tile + t) * kTile + r;
            float* const to = totals + (b * padded + row) * kLanes;
            Floats sum = load<Floats>(sums + ((t * 2 + b) * kTile + r) * kLanes);
            if (plan.uniform) sum -= zero[b] * row_sums[row * plan.groups + g];
            store(to, load<Floats>(to) + sum * scale[b]);
          }
    };
    const int64_t count = group.columns / kTileColumns, tile_stride = kTile * plan.columns;
    const uint16_t* const from = x + group.first * kTile;
    int64_t tile = 0;
    for (; tile + 2 <= row_tiles; tile += 2) {
      multiply_tiles<2, kBlocks>(from + tile * tile_stride, tile_stride, levels, stride, count,
                                 sums);
      add(tile, 2);
    }
    if (tile < row_tiles) {
      multiply_tiles<1, kBlocks>(from + tile * tile_stride, tile_stride, levels, stride, count,
                                 sums);
      add(tile, 1);
    }
  }
}

}  // namespace
}  // namespace precalib

#endif
