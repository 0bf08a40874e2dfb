// BF16 GEMM: tiles of x, the codebook in bfloat16, and the micro-kernel on AMX tiles (TDPBF16PS)
// or, without AMX, on registers (VDPBF16PS).
#pragma once

#include "amx_tiles.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kBf16TileColumns = 32;  // columns of a bfloat16 tile
constexpr int kBf16TileSize = kTile * kBf16TileColumns;

inline int64_t padded_rows(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }

// 32 bfloat16 or fp16 columns of a group, [segment][8 steps] from `from` on. The second and third
// segment are swapped, as they are in tiles of weights.
inline __m512i gather_columns(const uint16_t* from, int64_t segment) {
  __m512i v = _mm512_castsi128_si512(load<__m128i>(from));
  v = _mm512_inserti32x4(v, load<__m128i>(from + 2 * segment), 1);
  v = _mm512_inserti32x4(v, load<__m128i>(from + segment), 2);
  return _mm512_inserti32x4(v, load<__m128i>(from + 3 * segment), 3);
}

// Permutation of 32 values: those at even places, then those at odd ones.
constexpr U16x32 kEvenOdd = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// Calls use(k, segment length, first column) for each 32 columns: k counts columns in tile order,
// the first column in the order of x.
template <class Use>
inline void for_tile_columns(const X86Layout& layout, int64_t first, int64_t end, Use&& use) {
  for (; first < end; first += layout.group_size) {
    const int64_t segment = min(layout.group_size, layout.columns - first) / 4;
    for (int64_t t = 0; t < segment; t += kBf16TileColumns / 4)
      use(first + 4 * t, segment, first + t);
  }
}

// Column scales in tile order; of each 32, those at even places first.
inline void permute_scales(const X86Layout& layout, const uint16_t* scales, float* out) {
  for_tile_columns(layout, 0, layout.columns, [&](int64_t k, int64_t segment, int64_t column) {
    const U16x32 parted = (U16x32)_mm512_permutexvar_epi16(
        (__m512i)kEvenOdd, gather_columns(scales + column, segment));
    store(out + k, load_fp16(&parted));
    store(out + k + kLanes, load_fp16((const uint16_t*)&parted + kLanes));
  });
}

// Writes one row of x, times the scales from `permute_scales`, into bfloat16 tiles
// [panel][tile of rows][tile of 32 columns][16][32] of `rows` in all.
inline void permute_to_panels(const X86Layout& layout, int64_t panel, const uint16_t* x,
                              const float* scales, int64_t row, int64_t rows, uint16_t* tiles) {
  // [segment][8 steps], even places before odd ones, to [8 steps][segment]
  constexpr U16x32 kOrder = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                             2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  for (int64_t first = 0; first < layout.columns; first += panel) {
    const int64_t end = min(first + panel, layout.columns);
    uint16_t* const to = tiles + first * padded_rows(rows) + row / kTile * kTile * (end - first) +
                         row % kTile * kBf16TileColumns - first * kTile;
    for_tile_columns(layout, first, end, [&](int64_t k, int64_t segment, int64_t column) {
      __m512i v = gather_columns(x + column, segment);
      if (scales) {
        const F32x16 even = (F32x16)((U32x16)v << 16) * load<F32x16>(scales + k);
        const F32x16 odd = (F32x16)((U32x16)v & 0xffff0000u) * load<F32x16>(scales + k + kLanes);
        v = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      } else {
        v = _mm512_permutexvar_epi16((__m512i)kEvenOdd, v);
      }
      store(to + k * kTile, _mm512_permutexvar_epi16((__m512i)kOrder, v));
    });
  }
}

// The codebook in bfloat16, which holds its int8 entries exactly: two byte tables, low and high.
template <int kBits>
class Bf16Codebook {
 public:
  explicit Bf16Codebook(const X86Layout& layout)
      : low_(table(layout, 0)), high_(table(layout, 1)) {}

  // Entries of one step: in each row's lane those of segments 0 and 2, then those of 1 and 3.
  std::pair<U16x32, U16x32> lookup(U16x32 index) const {
    const U16x32 low = (U16x32)low_.lookup(index), high = (U16x32)high_.lookup(index);
    return {select(U16x32{} + 0xff, low, high << 8), select(U16x32{} + 0xff, low >> 8, high)};
  }

 private:
  static ByteTable<kBits + 2> table(const X86Layout& layout, int byte) {
    int8_t bytes[128];
    for (int i = 0; i < 128; ++i) {
      const float entry = layout.codebook[i];
      bytes[i] = int8_t(load<uint32_t>(&entry) >> (16 + 8 * byte));
    }
    return ByteTable<kBits + 2>(bytes);
  }
  ByteTable<kBits + 2> low_, high_;
};

// Overwrites base weights of a group of a block by its salient weights, in a panel of bfloat16.
class SalientScatter {
 public:
  explicit SalientScatter(const X86Layout& layout)
      : count_(layout.salient_count), slots_(layout.salient_count) {}

  // Decodes the salient weights. Call it well before `scatter`: reading back at once what was just
  // stored stalls. value(F32x16): what to write for a salient weight.
  template <class Value>
  void prepare(const X86Layout& layout, const Block& block, const Group& group, Value&& value) {
    // Within four steps, position 4 * step + segment lies at row 2 * step + segment % 2 of
    // [16 rows][segment / 2].
    constexpr I32x16 kPlaces = {0,   32,  1,   33,  64,  96,  65,  97,
                                128, 160, 129, 161, 192, 224, 193, 225};
    for (int64_t j = 0; j < count_; ++j) {
      const Salient salient = find_salient(layout, block, group, j);
      SalientSlot& slot = slots_.data[j];
      store(slot.value, to_bf16(value(salient.value)));
      const I32x16 low =
          (I32x16)_mm512_permutexvar_epi32((__m512i)salient.position, (__m512i)kPlaces);
      store(slot.place, select(I32x16{} + ~255, salient.position << 4, low));
      slot.used = unsigned(_mm512_movepi32_mask((__m512i)salient.used));
    }
  }

  void scatter(uint16_t* to) const {
    for (int64_t j = 0; j < count_; ++j) {
      const SalientSlot& slot = slots_.data[j];
      if (slot.used == 0xffff) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) to[slot.place[row] + 2 * row] = slot.value[row];
      } else {
        for (unsigned used = slot.used; used; used &= used - 1) {
          const int row = __builtin_ctz(used);
          to[slot.place[row] + 2 * row] = slot.value[row];
        }
      }
    }
  }

 private:
  struct SalientSlot {
    alignas(32) uint16_t value[kLanes];
    alignas(64) int32_t place[kLanes];  // offset in the panel, for row 0
    unsigned used;                      // bit mask of rows
  };
  const int64_t count_;
  Buffer<SalientSlot> slots_;
};

// Calls use(count, first tile) for all tiles of 16 rows, two at a time and then the last alone.
template <class Use>
inline void for_row_tiles(int64_t rows, Use&& use) {
  const int64_t count = padded_rows(rows) / kTile;
  int64_t tile = 0;
  for (; tile + 2 <= count; tile += 2) use(std::integral_constant<int, 2>{}, tile);
  if (tile < count) use(std::integral_constant<int, 1>{}, tile);
}

#if defined(__AMX_BF16__)

// Prefetches the tile two steps ahead: hardware prefetchers do not follow tile loads.
template <bool kPrefetch>
inline void prefetch_ahead(const uint16_t* tile) {
  if constexpr (kPrefetch)
#pragma GCC unroll 16
    for (int row = 0; row < kTile; ++row)
      prefetch_l1((const uint8_t*)(tile + 2 * kBf16TileSize + row * kBf16TileColumns));
}

// Micro-kernel: kRowTiles tiles of x times kBlocks blocks of weights over `count` tiles of 32
// columns. sums: [tile of rows][kBlocks][16][16], accumulated unless `first`, for the first panel.
// kPrefetch: whether the tiles exceed the first-level cache. step(multiply) is called for each 32
// columns and has to call multiply(after), which calls after(i) behind the i-th tile product: work
// done there overlaps with the products.
template <int kRowTiles, int kBlocks, bool kPrefetch, class Step>
inline void multiply_bf16_tiles(const uint16_t* x, int64_t tile_stride, const uint16_t* weights,
                                int64_t stride, int64_t count, int64_t, bool first, float* sums,
                                Step&& step) {
  constexpr int kBelow = kBlocks * 256;  // sums from one tile of rows to the next
  compiler_fence();
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
  for (int64_t t = 0; t < count; ++t, x += kBf16TileSize, weights += kBf16TileSize)
    step([&](auto&& after) __attribute__((always_inline)) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, weights, 64);
      _tile_dpbf16ps(0, 4, 6);
      prefetch_ahead<kPrefetch>(x);
      prefetch_ahead<kPrefetch>(weights);
      after(std::integral_constant<int, 0>{});
      if constexpr (kBlocks > 1) {
        _tile_loadd(7, weights + stride, 64);
        _tile_dpbf16ps(1, 4, 7);
        prefetch_ahead<kPrefetch>(weights + stride);
        after(std::integral_constant<int, 1>{});
      }
      if constexpr (kRowTiles > 1) {
        _tile_loadd(5, x + tile_stride, 64);
        _tile_dpbf16ps(2, 5, 6);
        prefetch_ahead<kPrefetch>(x + tile_stride);
        after(std::integral_constant<int, kBlocks>{});
        if constexpr (kBlocks > 1) {
          _tile_dpbf16ps(3, 5, 7);
          after(std::integral_constant<int, 3>{});
        }
      }
    });
}

// Stores the accumulators that `multiply_bf16_tiles` left in tiles.
template <int kRowTiles, int kBlocks>
inline void store_bf16_tiles(float* sums) {
  constexpr int kBelow = kBlocks * 256;
  _tile_stored(0, sums, 64);
  if constexpr (kBlocks > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (kRowTiles > 1) _tile_stored(2, sums + kBelow, 64);
  if constexpr (kRowTiles > 1 && kBlocks > 1) _tile_stored(3, sums + kBelow + 256, 64);
}

#else

// Micro-kernel without AMX: kRows rows of x times kBlocks blocks, accumulated in registers. That
// many accumulators hide latency, and each load serves several products.
template <int kRows, int kBlocks>
inline void multiply_bf16_rows(const uint16_t* x, const uint16_t* weights, int64_t stride,
                               int64_t count, bool first, float* sums) {
  F32x16 sum[kBlocks][kRows] = {};
  if (!first)
    for (int b = 0; b < kBlocks; ++b)
      for (int r = 0; r < kRows; ++r) sum[b][r] = load<F32x16>(sums + (b * kTile + r) * kLanes);
  for (int64_t t = 0; t < count; ++t, x += kBf16TileSize, weights += kBf16TileSize)
    for (int pair = 0; pair < kBf16TileColumns / 2; ++pair) {
      __m512bh weight_pairs[kBlocks];
      for (int b = 0; b < kBlocks; ++b)
        weight_pairs[b] = (__m512bh)load<__m512i>(weights + b * stride + pair * 2 * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const __m512bh inputs =
            (__m512bh)_mm512_set1_epi32(load<int32_t>(x + r * kBf16TileColumns + 2 * pair));
        for (int b = 0; b < kBlocks; ++b)
          sum[b][r] = (F32x16)_mm512_dpbf16_ps((__m512)sum[b][r], inputs, weight_pairs[b]);
      }
    }
  for (int b = 0; b < kBlocks; ++b)
    for (int r = 0; r < kRows; ++r) store(sums + (b * kTile + r) * kLanes, sum[b][r]);
}

template <int kRowTiles, int kBlocks, bool kPrefetch, class Step>
inline void multiply_bf16_tiles(const uint16_t* x, int64_t tile_stride, const uint16_t* weights,
                                int64_t stride, int64_t count, int64_t rows, bool first,
                                float* sums, Step&&) {
  for (int tile = 0; tile < kRowTiles; ++tile, rows -= kTile)
    for (int row = 0; row < kTile && row < rows; row += 8) {
      const uint16_t* const from = x + tile * tile_stride + row * kBf16TileColumns;
      float* const to = sums + (tile * kBlocks * kTile + row) * kLanes;
      if (rows - row > 4) multiply_bf16_rows<8, kBlocks>(from, weights, stride, count, first, to);
      else multiply_bf16_rows<4, kBlocks>(from, weights, stride, count, first, to);
    }
}

template <int kRowTiles, int kBlocks>
inline void store_bf16_tiles(float*) {}

#endif

}  // namespace
}  // namespace precalib

#endif
