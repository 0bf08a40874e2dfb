// GEMV for M <= 4 on ISAs without VBMI: codebook entries, looked up by byte shuffles, times x in
// fixed point, in exact integer sums that are scaled group by group.
#pragma once

#include "shuffle_products.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Adds a group times kRows rows of x, of the rows of one part.
template <int kBits, bool kTrellis, class Product, int kRows>
inline void multiply_part(const LevelTable<kBits, kTrellis>& table, const uint8_t* planes,
                          int64_t chunks, int64_t ahead, const typename Product::Split* x,
                          int64_t stride, Ints* sums) {
  constexpr int kSums = kRows * Product::kSplits, kVectors = Product::kVectors;
  constexpr int kChains = kSums < 4 ? 2 : 1;  // sums at a time, to hide latency
  Ints sum[kChains][kSums] = {};
  for (int s = 0; s < kSums; ++s) sum[0][s] = sums[s];
  decode_entries(table, planes, chunks, ahead, [&](int64_t c, auto i, Words entries) {
    Product::spread(entries, [&](auto v, Words vector) {
      constexpr int kUnit = 4 / sizeof(typename Product::Split);
      const typename Product::Split* const inputs = x + c * kChunk + (i * kVectors + v) * kUnit;
#pragma GCC unroll 16
      for (int s = 0; s < kSums; ++s) {
        Ints& to = sum[(i * kVectors + v) % kChains][s];
        to = Product::add(to, vector, broadcast4(inputs + s * stride));
      }
    });
  });
  for (int s = 0; s < kSums; ++s) {
    sums[s] = sum[0][s];
    for (int c = 1; c < kChains; ++c) sums[s] = wrapping_add(sums[s], sum[c][s]);
  }
}

// kPartRows rows of a block times kRows rows of x. x: [kRows][columns] permuted; splits:
// [kRows][kSplits][columns]; groups: [kRows][groups]; sums: [kRows][16], overwritten.
template <int kBits, bool kTrellis, class Product, int kRows>
void gemv_shuffle_part(const X86Layout& layout, const Block& block, int part,
                       const EntryBytes& bytes, const LevelTable<kBits, kTrellis>& table,
                       const float* x, const typename Product::Split* splits,
                       const QuantizedGroup<Product::kSplits>* groups, float* sums) {
  constexpr int kSplits = Product::kSplits;
  const int row = part * kPartRows;
  Floats total[kRows] = {};
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    prefetch_metadata(layout, group, 1);
    Ints sum[kRows * kSplits] = {};
    if (Product::kShifted)
      for (int s = 0; s < kRows * kSplits; ++s)
        sum[s] += groups[s / kSplits * layout.groups + g].start[s % kSplits];
    multiply_part<kBits, kTrellis, Product, kRows>(table, group.planes + part * kWidth,
                                                   group.chunks, layout.block_bytes,
                                                   splits + group.first, layout.columns, sum);
    const Floats scale = group_scales<NativeLanes>(layout, block, group, row);
    const Floats zero = group_zeros<NativeLanes>(layout, group, row);
    const SumScales by = sum_scales<Product>(bytes, scale, zero);
    for (int r = 0; r < kRows; ++r) {
      const QuantizedGroup<kSplits>& quantized = groups[r * layout.groups + g];
      Floats dot = to_float(sum[r * kSplits]);
      for (int d = 1; d < kSplits; ++d)
        dot = dot * float(Product::kBase) + to_float(sum[r * kSplits + d]);
      total[r] += (dot - by.zero * quantized.total) * (by.scale * quantized.unit);
    }
    for (int64_t j = 0; j < layout.salient_count; ++j) {
      const auto salient = find_salient<NativeLanes>(layout, block, group, j, row);
      const Floats base = (salient.base_entry - zero) * scale;
      const Floats residual = (Floats)((Ints)(salient.value - base) & salient.used);
      for (int r = 0; r < kRows; ++r)
        total[r] += residual * NativeLanes::gather(x + r * layout.columns + group.first,
                                                   salient.position & salient.used);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes + row, total[r]);
}

}  // namespace
}  // namespace precalib

#endif
