// Any instruction set, type and number of rows: a group's weights as float32, then multiply-adds.
#pragma once

#include "activations.h"

namespace precalib {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

// weights: [4 * step + segment][16].
template <int kBits>
inline void unpack_floats(const Plan& plan, const Block& block, const Group& group,
                          const Table<kBits + 2>& table, float* weights) {
  const Floats scale = group_scales(plan, block, group);
  const Floats zero = group_zeros(plan, group);
  decode<kBits>(group.planes, group.chunks, plan.block_bytes, [&](int64_t step, Shorts index, auto) {
    const Ints levels = (Ints)table.find(index);
    for (int s = 0; s < 4; ++s) {
      const Floats level = to_floats(levels << (24 - 8 * s) >> 24);
      store(weights + (4 * step + s) * kLanes, (level - zero) * scale);
    }
  });
  for (int64_t j = 0; j < plan.salient_count; ++j) {
    const Salient salient = find_salient(plan, block, group, j);
    for (int lane = 0; lane < kLanes; ++lane)
      if (salient.used[lane]) weights[salient.position[lane] * kLanes + lane] = salient.value[lane];
  }
}

// sums[row] += weights * x[row], for kRows rows of x.
template <int kRows>
inline void multiply_floats(const float* weights, int64_t columns, const float* x, int64_t stride,
                            float* sums) {
  Floats total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = load<Floats>(sums + r * kLanes);
  for (int64_t k = 0; k < columns; ++k) {
    const Floats weight = load<Floats>(weights + k * kLanes);
    for (int r = 0; r < kRows; ++r) total[r] += weight * x[r * stride + k];
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, total[r]);
}

// x: arranged rows of the block's part; weights: [group_size][16]; sums: [rows][16], cleared here.
template <int kBits>
void plain_block(const Plan& plan, const Block& block, const float* x, int64_t rows, float* weights,
                 float* sums) {
  const Table<kBits + 2> table(plan.levels);
  std::memset(sums, 0, size_t(rows) * kLanes * 4);
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Group group = find_group(plan, block, g);
    unpack_floats<kBits>(plan, block, group, table, weights);
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      multiply_floats<kTileRows>(weights, group.columns, x + r * plan.columns + group.first,
                                 plan.columns, sums + r * kLanes);
    for (; r < rows; ++r)
      multiply_floats<1>(weights, group.columns, x + r * plan.columns + group.first, plan.columns,
                         sums + r * kLanes);
  }
}

}  // namespace
}  // namespace precalib
