// GEMM for M > 4 on ISAs without VBMI. A group of a block of weights is unpacked into a panel in
// the first-level cache and multiplied by all rows of x, a few at a time, with sums in registers.
// Entries are multiplied in fixed point as in `gemv_shuffle.h`, and sums scaled group by group.
#pragma once

#include "shuffle_products.h"
#include "shuffle_tiles.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

// x of some rows as a GEMM reads it, by group and row.
template <class Product>
struct Inputs {
  typename Product::Split* values;  // [group][row][group_size]
  float* units;                     // [group][row]: value of one
  float* totals;                    // [group][row]: sum, in units
  int32_t* starts;                  // [group][row]: -128 times the sum
  float* columns;                   // [tile of kPartRows rows][column][row], for salient weights
};

// Unpacks a group to entries [step][vector][16].
template <int kBits, bool kTrellis, class Product>
inline void unpack_entries(const LevelTable<kBits, kTrellis>& table, const Group& group,
                           int64_t ahead, uint8_t* panel) {
  for (int part = 0; part < kParts; ++part)
    decode_entries(
        table, group.planes + part * kWidth, group.chunks, ahead,
        [&](int64_t c, auto i, Words entries) {
          Product::spread(entries, [&](auto v, Words vector) {
            store(panel + ((8 * c + i) * Product::kVectors + v) * kVector + part * kWidth, vector);
          });
        });
}

// totals[row][16] += a group of a block times all rows of x, in fixed point. by: of the parts.
template <class Product>
void multiply_group(const uint8_t* panel, const Group& group, const SumScales* by,
                    const Inputs<Product>& x, int64_t group_size, int64_t index, int64_t slab,
                    int64_t rows, float* totals) {
  constexpr int kUnit = 4 / sizeof(typename Product::Split);
  for_tiles(rows, [&]<int kRows>(int64_t first) {
    const int64_t at = index * slab + first;
    multiply_tile<Product, kRows>(
        panel, (const uint8_t*)(x.values + at * group_size),
        group_size * int64_t(sizeof(typename Product::Split)), group.columns / kUnit,
        [&](int r, int) { return Ints{} + (Product::kShifted ? x.starts[at + r] : 0); },
        [&](int r, int p, Ints sum) {
          float* const to = totals + (first + r) * kLanes + p * kPartRows;
          const Floats dot = to_float(sum) - by[p].zero * x.totals[at + r];
          const Floats unit = by[p].scale * x.units[at + r];
          store(to, load<Floats>(to) + dot * unit);
        });
  });
}

}  // namespace
}  // namespace precalib

#endif
