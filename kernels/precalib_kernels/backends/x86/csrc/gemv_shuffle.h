// GEMV for M <= 4 on ISAs without VBMI: codebook entries, looked up by byte shuffles, times x in
// fixed point, in exact integer sums that are scaled group by group.
#pragma once

#include "shuffle_products.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// The group's x at the salient positions, anything in unused slots.
inline F32x16 gather_salient(const float* x, const Salient& salient) {
#if defined(__AVX512F__)
  return gather(x, salient.position & salient.used);
#else
  const I32x16 at = salient.position & salient.used;
  return convert_by_256_bits<F32x16>(
      &at, 32, [&](const char* from) { return _mm256_i32gather_ps(x, load<__m256i>(from), 4); });
#endif
}

// Sums of a group times kRows rows of x, of the rows of one part. sums: [kRows][kSplits][16].
template <int kBits, bool kTrellis, class Product, int kRows>
inline void multiply_part(const LevelTable<kBits, kTrellis>& table, const uint8_t* planes,
                          int64_t chunks, int64_t ahead, const typename Product::Split* x,
                          int64_t stride, const int32_t* starts, int32_t* sums) {
  constexpr int kSplits = Product::kSplits, kVectors = Product::kVectors;
  constexpr int kChains = kRows * kSplits < 4 ? 2 : 1;  // sums at a time, to hide latency
  Ints sum[kChains][kRows * kSplits] = {};
  for (int s = 0; s < kRows * kSplits; ++s) sum[0][s] = Ints{} + starts[s];
  for (int64_t c = 0; c < chunks; ++c) {
    const typename Product::Split* const inputs = x + c * kChunk;
    ChunkLevels<kBits, kTrellis>(planes, chunks, c, ahead)
        .decode(table, [&](auto i, Words entries) {
          Product::spread(entries, [&](auto v, Words vector) {
            constexpr int kUnit = 4 / sizeof(typename Product::Split);
#pragma GCC unroll 16
            for (int s = 0; s < kRows * kSplits; ++s) {
              Ints& to = sum[(i * kVectors + v) % kChains][s];
              to = Product::add(to, vector,
                                broadcast4(inputs + s * stride + (i * kVectors + v) * kUnit));
            }
          });
        });
  }
  for (int s = 0; s < kRows * kSplits; ++s) {
    Ints all = sum[0][s];
    for (int c = 1; c < kChains; ++c) all = wrapping_add(all, sum[c][s]);
    store(sums + s * kLanes, all);
  }
}

// A block of weights times kRows rows of x. x: [kRows][columns] permuted; splits:
// [kRows][kSplits][columns]; groups: [kRows][groups]; sums: [kRows][16], overwritten.
template <int kBits, bool kTrellis, class Product, int kRows>
void gemv_shuffle_block(const X86Layout& layout, const Block& block, const EntryBytes& bytes,
                        const LevelTable<kBits, kTrellis>& table, const float* x,
                        const typename Product::Split* splits,
                        const QuantizedGroup<Product::kSplits>* groups, float* sums) {
  constexpr int kSplits = Product::kSplits;
  F32x16 total[kRows] = {};
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    prefetch_metadata(layout, group, 1);
    int32_t starts[kRows * kSplits] = {};
    if (Product::kShifted)
      for (int r = 0; r < kRows; ++r)
        for (int d = 0; d < kSplits; ++d)
          starts[r * kSplits + d] = groups[r * layout.groups + g].start[d];
    alignas(64) int32_t sum[kRows * kSplits * kLanes];
    for (int part = 0; part < kParts; ++part)
      multiply_part<kBits, kTrellis, Product, kRows>(
          table, group.planes + part * kWidth, group.chunks, layout.block_bytes,
          splits + group.first, layout.columns, starts, sum + part * kPartRows);
    const F32x16 scale = group_scales(layout, block, group), zero = group_zeros(layout, group);
    const SumScales by = sum_scales<Product>(bytes, scale, zero);
    for (int r = 0; r < kRows; ++r) {
      const QuantizedGroup<kSplits>& quantized = groups[r * layout.groups + g];
      const F32x16 dot = join_splits<kSplits, Product::kBase>(
          [&](int d) { return load<I32x16>(sum + (r * kSplits + d) * kLanes); });
      total[r] += (dot - by.zero * quantized.total) * (by.scale * quantized.unit);
    }
    for (int64_t j = 0; j < layout.salient_count; ++j) {
      const Salient salient = find_salient(layout, block, group, j);
      const F32x16 base = (salient.base_entry - zero) * scale;
      const F32x16 residual = (F32x16)((I32x16)(salient.value - base) & salient.used);
      for (int r = 0; r < kRows; ++r)
        total[r] += residual * gather_salient(x + r * layout.columns + group.first, salient);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, total[r]);
}

}  // namespace
}  // namespace precalib

#endif
