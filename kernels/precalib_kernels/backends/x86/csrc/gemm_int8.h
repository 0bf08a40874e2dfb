// INT8 GEMM: codebook entries times the int8 splits of x (`quantize_activations.h`), in exact
// integer sums by AMX tiles (TDPBSSD) or VPDPBUSD, scaled group by group. Salient weights are added
// as residuals in float32, see `salient_residual.h`.
#pragma once

#include "quantize_activations.h"
#include "salient_residual.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int kInt8TileColumns = 64;  // columns of an int8 tile
constexpr int kInt8TileBytes = kTile * kInt8TileColumns;
#if defined(__AMX_INT8__)
constexpr int kCodebookShift = 0;
template <int kSplits>
constexpr int64_t kRegisterRows = 0;
#else
constexpr int kCodebookShift =
    128;  // VPDPBUSD takes unsigned bytes; sums start at what the shift adds
// Up to this M, entries are multiplied in the registers where they are unpacked: accumulators and
// table fit into 32 registers. With one split that is a whole tile, and larger M go tile by tile.
template <int kSplits>
constexpr int64_t kRegisterRows = kSplits == 1   ? kTile
                                  : kSplits == 2 ? 8
                                                 : 6;
#endif

inline int64_t int8_tiles(int64_t columns) {
  return (columns + kInt8TileColumns - 1) / kInt8TileColumns;
}

// Tiles of a whole row: each group begins a new one.
inline int64_t int8_tiles(const X86Layout& layout) {
  const int64_t last = layout.columns - (layout.groups - 1) * layout.group_size;
  return (layout.groups - 1) * int8_tiles(layout.group_size) + int8_tiles(last);
}

// Sixteen quantized rows of x, in memory that the caller owns.
struct QuantizedTile {
  int8_t* tiles;    // [tile][split][row][64]
  float* units;     // [group][row]: value of one in the last split
  float* totals;    // [group][row]: sum of the quantized values, in units
  int32_t* starts;  // [group][split][row]: initial accumulators
  float* columns;   // [column][row]: float32, for salient residuals
};

// Quantizes one group of sixteen rows of x. x: [16][group_size] permuted, zeros from `rows` on.
template <int kSplits>
void quantize_tile(const X86Layout& layout, const float* x, int64_t group, int64_t rows,
                   const QuantizedTile& out) {
  const int64_t first = group * layout.group_size;
  const int64_t count = min(layout.group_size, layout.columns - first);
  int8_t* const tiles =
      out.tiles + group * int8_tiles(layout.group_size) * kSplits * kInt8TileBytes;
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = [&](int d, int64_t k) {
      return tiles + (k / kInt8TileColumns * kSplits + d) * kInt8TileBytes + r * kInt8TileColumns +
             k % kInt8TileColumns;
    };
    const QuantizedGroup<kSplits> quantized =
        quantize_group<kSplits>(x + r * layout.group_size, count, at);
    out.units[group * kTile + r] = quantized.unit;
    out.totals[group * kTile + r] = quantized.total;
    for (int d = 0; d < kSplits; ++d)
      out.starts[(group * kSplits + d) * kTile + r] = kCodebookShift / 128 * quantized.start[d];
  }
  if (layout.salient_count)
    for (int64_t k = 0; k < count; k += kTile) {
      F32x16 square[kTile];
      transpose_16x16(x + k, layout.group_size, square);
      for (int r = 0; r < kTile; ++r) store(out.columns + (first + k + r) * kTile, square[r]);
    }
}

#if defined(__AMX_INT8__)

// Micro-kernel on AMX tiles, which keep the sums. Tiles suffice for two splits by two blocks.
template <int kSplits, int kBlocks>
inline void multiply_int8_tiles(const int8_t* x, const uint8_t* entries, int64_t stride,
                                int64_t count, int64_t, const int32_t*, int32_t*) {
  static_assert(kSplits < 3 || kBlocks == 1);
  compiler_fence();
  _tile_zero(0);
  if constexpr (kSplits * kBlocks > 1) _tile_zero(1);
  if constexpr (kSplits * kBlocks > 2) _tile_zero(2);
  if constexpr (kSplits * kBlocks > 3) _tile_zero(3);
  for (int64_t t = 0; t < count; ++t, x += kSplits * kInt8TileBytes, entries += kInt8TileBytes) {
    _tile_loadd(6, entries, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kSplits > 1) {
      _tile_loadd(5, x + kInt8TileBytes, 64);
      _tile_dpbssd(1, 5, 6);
    }
    if constexpr (kSplits > 2) {
      _tile_loadd(3, x + 2 * kInt8TileBytes, 64);
      _tile_dpbssd(2, 3, 6);
    }
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, entries + stride, 64);
      if constexpr (kSplits == 1) _tile_dpbssd(1, 4, 7);
      if constexpr (kSplits == 2) _tile_dpbssd(2, 4, 7);
      if constexpr (kSplits == 2) _tile_dpbssd(3, 5, 7);
    }
  }
}

// Stores the sums. sums: [block][split][row][16].
template <int kSplits, int kBlocks>
inline void store_int8_tiles(int32_t* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (kSplits * kBlocks > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (kSplits * kBlocks > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (kSplits * kBlocks > 3) _tile_stored(3, sums + 768, 64);
}

#else

template <int kSplits, int kBlocks>
inline void multiply_int8_tiles(const int8_t* x, const uint8_t* entries, int64_t stride,
                                int64_t count, int64_t rows, const int32_t* starts, int32_t* sums) {
  constexpr int kAtOnce = 8;
  for (int d = 0; d < kSplits; ++d)
    for (int64_t first = 0; first < rows; first += kAtOnce) {
      I32x16 sum[kBlocks][kAtOnce];
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int r = 0; r < kAtOnce; ++r) sum[b][r] = I32x16{} + starts[d * kTile + first + r];
      for (int64_t t = 0; t < count; ++t)
        for (int step = 0; step < kTile; ++step) {
          const int8_t* const from =
              x + (t * kSplits + d) * kInt8TileBytes + first * kInt8TileColumns + 4 * step;
          __m512i weights[kBlocks];
#pragma GCC unroll 16
          for (int b = 0; b < kBlocks; ++b)
            weights[b] = load<__m512i>(entries + b * stride + t * kInt8TileBytes + step * 64);
#pragma GCC unroll 16
          for (int r = 0; r < kAtOnce; ++r)
#pragma GCC unroll 16
            for (int b = 0; b < kBlocks; ++b)
              sum[b][r] = add_dot4(sum[b][r], weights[b], from + r * kInt8TileColumns);
        }
#pragma GCC unroll 16
      for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 16
        for (int r = 0; r < kAtOnce; ++r)
          store(sums + ((b * kSplits + d) * kTile + first + r) * kLanes, sum[b][r]);
    }
}

template <int kSplits, int kBlocks>
inline void store_int8_tiles(int32_t*) {}

#endif

// Unpacks one group of kBlocks blocks to codebook entries [kBlocks][tiles][16][64], `stride` bytes
// from block to block.
template <int kBits, int kBlocks>
inline void unpack_codebook(const X86Layout& layout, const Block* blocks, int64_t index,
                            const ByteTable<kBits + 2>& table, int64_t stride, uint8_t* to) {
  for (int b = 0; b < kBlocks; ++b, to += stride) {
    const Group group = find_group(layout, blocks[b], index);
    prefetch_metadata(layout, group, 2);
    decode<kBits>(
        group.planes, group.chunks, 2 * layout.block_bytes,
        [&](int64_t step, U16x32 at, auto) { store(to + step * kVector, table.lookup(at)); });
    if (group.columns % kInt8TileColumns)
      std::memset(to + group.columns * kLanes, 0, kInt8TileBytes / 2);
  }
}

// totals[block][row] += the scaled sums of a group.
template <int kSplits, int kBlocks>
inline void scale_sums(const X86Layout& layout, const Block* blocks, const QuantizedTile& x,
                       int64_t index, int64_t rows, const int32_t* sums, float* totals) {
  const float* const units = x.units + index * kTile;
  const float* const input_totals = x.totals + index * kTile;
  for (int b = 0; b < kBlocks; ++b) {
    const Group group = find_group(layout, blocks[b], index);
    const F32x16 scale = group_scales(layout, blocks[b], group), zero = group_zeros(layout, group);
    const bool uniform = layout.uniform;
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const from = sums + (b * kSplits * kTile + r) * kLanes;
      float* const to = totals + (b * kTile + r) * kLanes;
      F32x16 dot =
          join_splits<kSplits>([&](int d) { return load<I32x16>(from + d * kTile * kLanes); });
      if (uniform) dot -= zero * input_totals[r];
      store(to, load<F32x16>(to) + dot * (scale * units[r]));
    }
  }
}

// Micro-kernel for few rows: a block times kRows rows of x, its codebook entries staying in
// registers. totals: [kRows][16], accumulated.
template <int kBits, int kSplits, int kRows>
void register_rows(const X86Layout& layout, const Block& block, const QuantizedTile& x,
                   const ByteTable<kBits + 2>& table, float* totals) {
  const int64_t stride = int8_tiles(layout.group_size) * kSplits * kInt8TileBytes;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    prefetch_metadata(layout, group, 1);
    const int32_t* const starts = x.starts + g * kSplits * kTile;
    I32x16 sum[kSplits][kRows];
#pragma GCC unroll 16
    for (int d = 0; d < kSplits; ++d)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[d][r] = I32x16{} + starts[d * kTile + r];
    const int8_t* const tiles = x.tiles + g * stride;
    decode<kBits>(
        group.planes, group.chunks, layout.block_bytes, [&](int64_t step, U16x32 at, auto) {
          const __m512i entries = (__m512i)table.lookup(at);
          const int8_t* const from =
              tiles + step / kTile * kSplits * kInt8TileBytes + step % kTile * 4;
#pragma GCC unroll 16
          for (int d = 0; d < kSplits; ++d)
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r)
              sum[d][r] =
                  add_dot4(sum[d][r], entries, from + d * kInt8TileBytes + r * kInt8TileColumns);
        });
    const F32x16 scale = group_scales(layout, block, group), zero = group_zeros(layout, group);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32x16 dot =
          join_splits<kSplits>([&](int d) { return sum[d][r]; }) - zero * x.totals[g * kTile + r];
      float* const to = totals + r * kLanes;
      store(to, load<F32x16>(to) + dot * (scale * x.units[g * kTile + r]));
    }
  }
}

// kBlocks blocks of weights times all rows of x. x: one per sixteen rows; entries: scratch
// [kBlocks][tiles of a group][16][64]; totals: [tile of rows][kBlocks][16][16], overwritten.
// Unpacking does not overlap with multiplying: that took twice the memory and longer.
template <int kBits, int kSplits, int kBlocks>
void gemm_int8_blocks(const X86Layout& layout, const Block* blocks, const QuantizedTile* x,
                      int64_t rows, uint8_t* entries, float* totals) {
  const int64_t row_tiles = (rows + kTile - 1) / kTile;
  std::memset(totals, 0, size_t(row_tiles * kBlocks * kTile * kLanes) * 4);
  alignas(64) int32_t sums[kBlocks * kSplits * kTile * kLanes];
  const ByteTable<kBits + 2> table = codebook_table<kBits>(layout, kCodebookShift);
  if constexpr (kRegisterRows<kSplits> > 0) {
    constexpr int kMost = kRegisterRows<kSplits>;
    if (rows <= kMost || kMost == kTile) {
      for (int b = 0; b < kBlocks; ++b)
        for (int64_t t = 0; t < row_tiles; ++t) {
          const auto multiply = [&]<int kRows>() {
            register_rows<kBits, kSplits, kRows>(layout, blocks[b], x[t], table,
                                                 totals + (t * kBlocks + b) * kTile * kLanes);
          };
          const int64_t there = rows - t * kTile;
          if (there <= 6) multiply.template operator()<6>();
          else if (there <= 8) multiply.template operator()<min(8, kMost)>();
          else if (there <= 12) multiply.template operator()<min(12, kMost)>();
          else multiply.template operator()<kMost>();
        }
      return;
    }
  }
  const int64_t stride = int8_tiles(min(layout.group_size, layout.columns)) * kInt8TileBytes;
  for (int64_t g = 0; g < layout.groups; ++g) {
    unpack_codebook<kBits, kBlocks>(layout, blocks, g, table, stride, entries);
    const int64_t count =
        int8_tiles(min(layout.group_size, layout.columns - g * layout.group_size));
    for (int64_t t = 0; t < row_tiles; ++t) {
      const int64_t there = min(kTile, rows - t * kTile);
      multiply_int8_tiles<kSplits, kBlocks>(x[t].tiles + g * stride * kSplits, entries, stride,
                                            count, there, x[t].starts + g * kSplits * kTile, sums);
      store_int8_tiles<kSplits, kBlocks>(sums);
      scale_sums<kSplits, kBlocks>(layout, blocks, x[t], g, there, sums,
                                   totals + t * kBlocks * kTile * kLanes);
    }
  }
}

}  // namespace
}  // namespace precalib

#endif
