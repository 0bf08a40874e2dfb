// Many rows of x in bfloat16: weights become bfloat16, scales and salient weights in their places, a
// span of columns of a pair of blocks at a time, which stays in the first caches while AMX tiles or
// VDPBF16PS multiply it by all rows of x.
#pragma once

#include "plain.h"
#include "tiles.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kPairColumns = 32;  // columns in a tile of bfloat16
constexpr int kPairTile = kTile * kPairColumns;
constexpr int kSpanColumns = 256;  // about: whole groups

inline int64_t span_columns(const Plan& plan) {
  const int64_t groups = kSpanColumns / plan.group_size;
  return smaller((groups ? groups : 1) * plan.group_size, plan.columns);
}

// One row of x into tiles [span][tile of rows][32 columns' tile][16][32]; `padded` rows in all.
inline void to_spans(const Plan& plan, const float* x, int64_t row, int64_t padded,
                     uint16_t* tiles) {
  const int64_t span = span_columns(plan);
  for (int64_t first = 0; first < plan.columns; first += span) {
    const int64_t count = smaller(span, plan.columns - first);
    uint16_t* const to =
        tiles + first * padded + row / kTile * kTile * count + row % kTile * kPairColumns;
    for (int64_t k = 0; k < count; k += kLanes)
      store(to + k / kPairColumns * kPairTile + k % kPairColumns,
            to_bfloats(load<Floats>(x + first + k)));
  }
}

// a in the lower halves of lanes, b in the upper; of two values as near, the larger magnitude.
inline Words bfloat_pairs(Floats a, Floats b) {
  return select(Words{} + 0xffff0000u, (Words)b + 0x8000, ((Words)a + 0x8000) >> 16);
}

// Byte s of each lane as the second byte of a float: 128 + byte / 256.
template <int s>
inline Floats floats_of_byte(Words bytes) {
  const Words there = s == 0 ? bytes << 8 : bytes >> (s ? 8 * (s - 1) : 0);
  return (Floats)((there & 0xff00) | 0x43000000);
}

// A pair of blocks or one block, all rows of x in the tiles of its part, and its sums.
struct Share {
  const Block* blocks;
  int count;
  const uint16_t* x;
  float* totals;  // [tile of rows][count][16][16]
};

// Writes the weights of a span, a quarter of a chunk at a time.
template <int kBits>
class Merge {
 public:
  explicit Merge(const Plan& plan)
      : plan_(plan), shifted_(shifted_levels<kBits>(plan, 128)),
        salient_(plan.salient_count), stride_(span_columns(plan) * kLanes) {}
  int64_t stride() const { return stride_; }  // from a block's weights to the next one's

  // to: [share.count][2 * step + segment / 2 of all groups][16 rows][segment % 2].
  void begin(const Share& share, int64_t first, uint16_t* to) {
    share_ = &share;
    to_ = to;
    first_ = column_ = first;
    end_ = smaller(first + span_columns(plan_), plan_.columns);
    block_ = chunk_ = quarter_ = 0;
    left_ = 4 * share.count * (end_ - first) / kChunk;
  }
  int64_t left() const { return left_; }
  void advance() {
    --left_;
    switch (quarter_++) {
      case 0:
        if (chunk_ == 0) open();
        return write<0>();
      case 1: return write<2>();
      case 2: return write<4>();
    }
    write<6>();
    quarter_ = 0;
    if (++chunk_ == group_.chunks) close();
  }

 private:
  struct Change {
    alignas(32) uint16_t value[kLanes];
    alignas(64) int32_t place[kLanes];
    unsigned used;
  };

  // Begins a group.
  void open() {
    const Block& block = share_->blocks[block_];
    group_ = find_group(plan_, block, column_ / plan_.group_size);
    fetch_side(plan_, group_, 2);
    out_ = to_ + block_ * stride_ + (column_ - first_) * kLanes;
    // (256 (128 + (level + 128) / 256) - 32896) * scale, where 32896 * scale is exact
    const Words rounded = ((Words)group_scales(plan_, block, group_) + 0x100) & ~0x1ffu;
    const Floats scale = (Floats)rounded;
    scale_ = 256 * scale;
    offset_ = -32896 * scale;
    offset_ -= group_zeros(plan_, group_) * scale;
    find(block);
  }

  void close() {
    replace(out_);
    chunk_ = 0;
    column_ += group_.columns;
    if (column_ < end_) return;
    column_ = first_;
    ++block_;
  }

  // Two of a chunk's steps.
  template <int kFrom>
  void write() const {
    const Floats scale = scale_, offset = offset_;
    uint16_t* const out = out_;
    const auto use = [&](int64_t step, Shorts index, auto) {
      const Words levels = (Words)shifted_.find(index);
      const auto weights = [&]<int s>(std::integral_constant<int, s>) {
        return floats_of_byte<s>(levels) * scale + offset;
      };
      store(out + 4 * step * kLanes, bfloat_pairs(weights(std::integral_constant<int, 0>{}),
                                                  weights(std::integral_constant<int, 1>{})));
      store(out + (4 * step + 2) * kLanes, bfloat_pairs(weights(std::integral_constant<int, 2>{}),
                                                        weights(std::integral_constant<int, 3>{})));
    };
    decode_chunk<kBits, kFrom, kFrom + 2>(group_.planes, group_.chunks, chunk_,
                                          2 * plan_.block_bytes, use);
  }

  // Long before they are read back, which takes longer at once.
  void find(const Block& block) {
    for (int64_t j = 0; j < plan_.salient_count; ++j) {
      const Salient salient = find_salient(plan_, block, group_, j);
      const Ints segment = salient.position & 3, step = salient.position >> 2;
      Change& change = salient_.data[j];
      store(change.value, to_bfloats(salient.value));
      store(change.place, ((2 * step + (segment >> 1)) * kLanes + kLaneNumbers) * 2 + (segment & 1));
      change.used = unsigned(_mm512_movepi32_mask((__m512i)salient.used));
    }
  }
  void replace(uint16_t* to) {
    for (int64_t j = 0; j < plan_.salient_count; ++j) {
      const Change& change = salient_.data[j];
      if (change.used == 0xffff) {
        for (int l = 0; l < kLanes; ++l) to[change.place[l]] = change.value[l];
      } else {
        for (unsigned used = change.used; used; used &= used - 1) {
          const int l = __builtin_ctz(used);
          to[change.place[l]] = change.value[l];
        }
      }
    }
  }

  const Plan& plan_;
  const Table<kBits + 2> shifted_;
  Buffer<Change> salient_;
  const int64_t stride_;
  const Share* share_ = nullptr;
  uint16_t *to_ = nullptr, *out_ = nullptr;
  int64_t first_ = 0, end_ = 0, column_ = 0, block_ = 0, chunk_ = 0, left_ = 0;
  int quarter_ = 0;
  Group group_;
  Floats scale_, offset_;
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

#endif

// Adds the products of one span to the sums of all `padded` rows.
template <int kBlocks, class Work>
inline void multiply_span(const Plan& plan, const Share& share, int64_t first, int64_t padded,
                          const uint16_t* weights, int64_t stride, Work&& meanwhile) {
  const int64_t columns = smaller(span_columns(plan), plan.columns - first);
  const int64_t count = columns / kPairColumns, tile_stride = kTile * columns;
  const uint16_t* const x = share.x + first * padded;
  int64_t tile = 0;
  for (; (tile + 2) * kTile <= padded; tile += 2)
    multiply_pairs<2, kBlocks>(x + tile * tile_stride, tile_stride, weights, stride, count,
                               first == 0, share.totals + tile * kBlocks * kTile * kLanes,
                               meanwhile);
  if (tile * kTile < padded)
    multiply_pairs<1, kBlocks>(x + tile * tile_stride, tile_stride, weights, stride, count,
                               first == 0, share.totals + tile * kBlocks * kTile * kLanes,
                               meanwhile);
}

// All products of some shares. weights: [2][2][span_columns * 16], for use in here: while a span of
// one share is multiplied, that of the next is written.
template <int kBits>
void merge_shares(const Plan& plan, const Share* shares, int64_t count, int64_t padded,
                  uint16_t* weights) {
  Merge<kBits> next(plan);
  const int64_t span = span_columns(plan), stride = next.stride();
  const int64_t spans = (plan.columns + span - 1) / span, total = spans * count;
  const auto begin = [&](int64_t i) {
    next.begin(shares[i % count], i / count * span, weights + i % 2 * 2 * stride);
  };
  begin(0);
  while (next.left()) next.advance();
  for (int64_t i = 0; i < total; ++i) {
    const Share& share = shares[i % count];
    const int64_t first = i / count * span;
    if (i + 1 < total) begin(i + 1);
    // as evenly as it goes
    const int64_t products = padded / kTile * share.count *
                             (smaller(span, plan.columns - first) / kPairColumns);
    const int64_t pieces = next.left();
    int64_t due = 0;
    const auto meanwhile = [&] {
      for (due += pieces; due >= products; due -= products) next.advance();
    };
    const uint16_t* const now = weights + i % 2 * 2 * stride;
    if (share.count == 2) multiply_span<2>(plan, share, first, padded, now, stride, meanwhile);
    else multiply_span<1>(plan, share, first, padded, now, stride, meanwhile);
  }
}

}  // namespace
}  // namespace precalib

#endif
