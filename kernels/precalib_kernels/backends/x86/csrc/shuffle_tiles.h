// Tiles of a GEMM on ISAs without VBMI: a panel of weights times a few rows of x.
#pragma once

#include "shuffle_vectors.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// Rows of x at a time: their sums, weights and x fill 16 registers, or half of 32.
constexpr int kTileRows = kParts == 1 ? 12 : 6;

// Micro-kernel: a panel [unit][16 rows] times kRows rows of x, both in units of four bytes.
// start(row, part) gives sums to add to, use(row, part, sum) takes the results. Product::add adds
// the products of a unit. stride: bytes from row to row of x.
template <class Product, int kRows, class Start, class Use>
inline void multiply_tile(const uint8_t* panel, const uint8_t* x, int64_t stride, int64_t units,
                          Start&& start, Use&& use) {
  using Sum = decltype(start(0, 0));
  Sum sum[kRows][kParts];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) sum[r][p] = start(r, p);
  for (int64_t u = 0; u < units; ++u) {
    Words weights[kParts];
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) weights[p] = load<Words>(panel + u * kVector + p * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Ints inputs = broadcast4(x + r * stride + 4 * u);
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) sum[r][p] = Product::add(sum[r][p], weights[p], inputs);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) use(r, p, sum[r][p]);
}

// Calls use<count>(first).
template <int kMost, class Use>
inline void for_tile(int64_t count, int64_t first, Use&& use) {
  if constexpr (kMost > 1)
    if (count < kMost) return for_tile<kMost - 1>(count, first, use);
  use.template operator()<kMost>(first);
}

// Calls use<rows>(first row) for tiles of at most kTileRows rows, as equal as can be.
template <class Use>
inline void for_tiles(int64_t rows, Use&& use) {
  for (int64_t tiles = (rows + kTileRows - 1) / kTileRows, first = 0; tiles > 0; --tiles) {
    const int64_t count = (rows - first + tiles - 1) / tiles;
    for_tile<kTileRows>(count, first, use);
    first += count;
  }
}

}  // namespace
}  // namespace precalib

#endif
