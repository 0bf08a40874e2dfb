// INT8 GEMV, M <= 4: codebook entries times the int8 splits of x (`quantize_activations.h`), in
// exact integer sums by VPDPBUSD, scaled group by group.
//
// VPDPBUSD takes unsigned bytes, so entries are shifted by 128; sums start at what that adds.
#pragma once

#include "quantize_activations.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Gathers the group's x at the salient positions: by register permutes of up to 128 columns, which
// read column 0 in unused slots, else from memory.
inline F32x16 gather_x(const float* x, int64_t columns, const Salient& salient) {
  const I32x16 at = salient.position;
  const auto permute32 = [&](int first) {  // of 32 columns
    return (F32x16)_mm512_permutex2var_ps(load<__m512>(x + first), (__m512i)at,
                                          load<__m512>(x + first + kLanes));
  };
  const auto choose = [&](int bit, F32x16 set, F32x16 clear) {
    return (F32x16)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)at, _mm512_set1_epi32(bit)),
                                        (__m512)clear, (__m512)set);
  };
  if (columns > 128) return gather(x, at & salient.used);
  const F32x16 low = choose(32, permute32(32), permute32(0));
  return columns > 64 ? choose(64, choose(32, permute32(96), permute32(64)), low) : low;
}

// A block of weights times kRows rows of x. x: [kRows][columns] permuted; splits:
// [kRows][kSplits][columns]; groups: [kRows][groups]; sums: [kRows][16], overwritten.
template <int kBits, int kSplits, int kRows>
void gemv_block(const X86Layout& layout, const Block& block, const float* x, const int8_t* splits,
                const QuantizedGroup<kSplits>* groups, float* sums) {
  constexpr int kChains = kRows * kSplits < 4 ? 2 : 1;  // accumulators at a time, to hide latency
  const ByteTable<kBits + 2> unsigned_codebook = codebook_table<kBits>(layout, 128);
  F32x16 total[kRows] = {};
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    prefetch_metadata(layout, group, 1);
    I32x16 sum[kChains][kRows][kSplits] = {};
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < kSplits; ++d)
        sum[0][r][d] = I32x16{} + groups[r * layout.groups + g].start[d];
    const int8_t* const inputs = splits + group.first;
    const auto add = [&](int64_t step, U16x32 index, auto i) {
      const __m512i weights = (__m512i)unsigned_codebook.lookup(index);
      for (int r = 0; r < kRows; ++r)
        for (int d = 0; d < kSplits; ++d) {
          I32x16& to = sum[i % kChains][r][d];
          to = add_dot4(to, weights, inputs + (r * kSplits + d) * layout.columns + 4 * step);
        }
    };
    decode<kBits>(group.planes, group.chunks, layout.block_bytes, add);
    const F32x16 scale = group_scales(layout, block, group);
    const F32x16 zero = group_zeros(layout, group);
    for (int r = 0; r < kRows; ++r) {
      const QuantizedGroup<kSplits>& quantized = groups[r * layout.groups + g];
      const F32x16 dot = join_splits<kSplits>([&](int d) {
        I32x16 split = sum[0][r][d];
        for (int c = 1; c < kChains; ++c) split += sum[c][r][d];
        return split;
      });
      total[r] += (dot - zero * quantized.total) * (scale * quantized.unit);
    }
    for (int64_t j = 0; j < layout.salient_count; ++j) {
      const Salient salient = find_salient(layout, block, group, j);
      const F32x16 base = (salient.base_entry - zero) * scale;
      const F32x16 residual = (F32x16)((I32x16)(salient.value - base) & salient.used);
      for (int r = 0; r < kRows; ++r)
        total[r] +=
            residual * gather_x(x + r * layout.columns + group.first, group.columns, salient);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, total[r]);
}

}  // namespace
}  // namespace precalib

#endif
