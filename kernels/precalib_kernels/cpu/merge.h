// Many rows of x in bfloat16: weights become bfloat16, scales and salient weights in their places, a
// span of columns of a pair of blocks at a time, which stays in the first caches while AMX tiles or
// VDPBF16PS multiply it by all rows of x.
#pragma once

#include "bfloats.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int kSpanColumns = 256;  // about: whole groups

inline int64_t span_columns(const Plan& plan) {
  const int64_t groups = kSpanColumns / plan.group_size;
  return smaller((groups ? groups : 1) * plan.group_size, plan.columns);
}

// a in the lower halves of lanes, b in the upper, cut off. Values are made larger beforehand by what
// that takes from a mantissa on average: 2**-8 * log2(e) / 2 of it.
constexpr float kBeforeCut = 1 + 0.00282f;
inline Words cut_pairs(Floats a, Floats b) {
  return select(Words{} + 0xffff0000u, (Words)b, (Words)a >> 16);
}

// Byte s of each lane as the second byte of a float: 128 + byte / 256.
template <int s>
inline Floats floats_of_byte(Words bytes) {
  const Words base = Words{} + 0x43000000;
  if constexpr (s == 1) return (Floats)select(Words{} + 0xff00, bytes, base);
  const __m512i from = _mm512_broadcast_i32x4(_mm_setr_epi8(
      0, s, 0, 0, 0, s + 4, 0, 0, 0, s + 8, 0, 0, 0, s + 12, 0, 0));
  return (Floats)_mm512_mask_shuffle_epi8((__m512i)base, 0x2222222222222222, (__m512i)bytes, from);
}

// Writes the weights of a span, a chunk of a group at a time.
template <int kBits>
class Merge {
 public:
  explicit Merge(const Plan& plan)
      : plan_(plan), shifted_(shifted_levels<kBits>(plan, 128)), salient_(plan),
        stride_(span_columns(plan) * kLanes) {}
  int64_t stride() const { return stride_; }  // from a block's weights to the next one's

  // to: [share.count][2 * step + segment % 2 of all groups][16 rows][segment / 2].
  void begin(const Share& share, int64_t first, uint16_t* to) {
    share_ = &share;
    to_ = to;
    first_ = column_ = first;
    end_ = smaller(first + span_columns(plan_), plan_.columns);
    block_ = chunk_ = 0;
    left_ = share.count * (end_ - first) / kChunk;
  }
  int64_t left() const { return left_; }
  // Not once per place that calls it: the copies do not fit into the caches of instructions.
  [[gnu::noinline]] void advance() {
    --left_;
    if (chunk_ == 0) open();
    write();
    if (++chunk_ == group_.chunks) close();
  }

 private:
  // Begins a group.
  void open() {
    const Block& block = share_->blocks[block_];
    group_ = find_group(plan_, block, column_ / plan_.group_size);
    fetch_side(plan_, group_, 2);
    out_ = to_ + block_ * stride_ + (column_ - first_) * kLanes;
    // (256 (128 + (level + 128) / 256) - 32896) * scale, where 32896 * scale is exact
    const Floats larger = group_scales(plan_, block, group_) * kBeforeCut;
    const Floats scale = (Floats)(((Words)larger + 0x100) & ~0x1ffu);
    scale_ = 256 * scale;
    offset_ = -32896 * scale;
    offset_ -= group_zeros(plan_, group_) * scale;
    salient_.find(plan_, block, group_, [](Floats value) { return value; });
  }

  void close() {
    salient_.put(out_);
    chunk_ = 0;
    column_ += group_.columns;
    if (column_ < end_) return;
    column_ = first_;
    ++block_;
  }

  void write() const {
    const Floats scale = scale_, offset = offset_;
    uint16_t* const out = out_;
    const auto use = [&](int64_t step, Shorts index, auto) {
      const Words levels = (Words)shifted_.find(index);
      const auto weights = [&]<int s>(std::integral_constant<int, s>) {
        return floats_of_byte<s>(levels) * scale + offset;
      };
      store(out + 4 * step * kLanes, cut_pairs(weights(std::integral_constant<int, 0>{}),
                                               weights(std::integral_constant<int, 2>{})));
      store(out + (4 * step + 2) * kLanes, cut_pairs(weights(std::integral_constant<int, 1>{}),
                                                     weights(std::integral_constant<int, 3>{})));
    };
    decode_chunk<kBits>(group_.planes, group_.chunks, chunk_, 2 * plan_.block_bytes, use);
  }

  const Plan& plan_;
  const Table<kBits + 2> shifted_;
  Replacements salient_;
  const int64_t stride_;
  const Share* share_ = nullptr;
  uint16_t *to_ = nullptr, *out_ = nullptr;
  int64_t first_ = 0, end_ = 0, column_ = 0, block_ = 0, chunk_ = 0, left_ = 0;
  Group group_;
  Floats scale_, offset_;
};

// Adds the products of one span to the sums of all `padded` rows.
template <int kBlocks, class Work>
inline void multiply_span(const Plan& plan, const Share& share, int64_t first, int64_t padded,
                          const uint16_t* weights, int64_t stride, Work&& meanwhile) {
  const int64_t columns = smaller(span_columns(plan), plan.columns - first);
  const int64_t count = columns / kPairColumns, tile_stride = kTile * columns;
  const uint16_t* const x = share.x + first * padded;
  int64_t tile = 0;
  for (; (tile + 2) * kTile <= padded; tile += 2) {
    float* const sums = share.totals + tile * kBlocks * kTile * kLanes;
    multiply_pairs<2, kBlocks>(x + tile * tile_stride, tile_stride, weights, stride, count,
                               first == 0, sums, meanwhile);
    store_pairs<2, kBlocks>(sums);
  }
  if (tile * kTile < padded) {
    float* const sums = share.totals + tile * kBlocks * kTile * kLanes;
    multiply_pairs<1, kBlocks>(x + tile * tile_stride, tile_stride, weights, stride, count,
                               first == 0, sums, meanwhile);
    store_pairs<1, kBlocks>(sums);
  }
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
