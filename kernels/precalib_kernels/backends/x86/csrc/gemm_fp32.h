// FP32 GEMM for any ISA, type and M: a group's weights are dequantized to float32, then multiplied
// and added.
#pragma once

#include "activations.h"

namespace precalib {
namespace {

#if defined(__AVX512F__)
constexpr int kFp32TileRows = 8;
#else
constexpr int kFp32TileRows = 4;
#endif

// Dequantizes one group of a block. weights: [4 * step + segment][16].
template <int kBits>
inline void dequantize_group(const X86Layout& layout, const Block& block, const Group& group,
                             const ByteTable<kBits + 2>& table, float* weights) {
  const F32x16 scale = group_scales(layout, block, group);
  const F32x16 zero = group_zeros(layout, group);
  decode<kBits>(group.planes, group.chunks, layout.block_bytes,
                [&](int64_t step, U16x32 index, auto) {
                  const I32x16 entries = (I32x16)table.lookup(index);
                  for (int s = 0; s < 4; ++s) {
                    const F32x16 entry = to_f32(entries << (24 - 8 * s) >> 24);
                    store(weights + (4 * step + s) * kLanes, (entry - zero) * scale);
                  }
                });
  for (int64_t j = 0; j < layout.salient_count; ++j) {
    const Salient salient = find_salient(layout, block, group, j);
    for (int lane = 0; lane < kLanes; ++lane)
      if (salient.used[lane]) weights[salient.position[lane] * kLanes + lane] = salient.value[lane];
  }
}

// Micro-kernel: sums[row] += weights * x[row], for kRows rows of x.
template <int kRows>
inline void multiply_fp32(const float* weights, int64_t columns, const float* x, int64_t stride,
                          float* sums) {
  F32x16 total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = load<F32x16>(sums + r * kLanes);
  for (int64_t k = 0; k < columns; ++k) {
    const F32x16 weight = load<F32x16>(weights + k * kLanes);
    for (int r = 0; r < kRows; ++r) total[r] += weight * x[r * stride + k];
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, total[r]);
}

// A block of weights times all rows of x. x: permuted rows of the block's shard; weights: scratch
// [group_size][16]; sums: [rows][16], overwritten.
template <int kBits>
void gemm_fp32_block(const X86Layout& layout, const Block& block, const float* x, int64_t rows,
                     float* weights, float* sums) {
  const ByteTable<kBits + 2> table(layout.codebook);
  std::memset(sums, 0, size_t(rows) * kLanes * 4);
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Group group = find_group(layout, block, g);
    dequantize_group<kBits>(layout, block, group, table, weights);
    int64_t r = 0;
    for (; r + kFp32TileRows <= rows; r += kFp32TileRows)
      multiply_fp32<kFp32TileRows>(weights, group.columns, x + r * layout.columns + group.first,
                                   layout.columns, sums + r * kLanes);
    for (; r < rows; ++r)
      multiply_fp32<1>(weights, group.columns, x + r * layout.columns + group.first, layout.columns,
                       sums + r * kLanes);
  }
}

}  // namespace
}  // namespace precalib
