// Products of codebook entries and int8 splits of x, in exact integer sums: by SDOT, and by SMMLA
// on processors with i8mm.
//
// SDOT multiplies the four bytes of a lane, four columns of a row of the block, with four columns
// of one virtual row of x. SMMLA multiplies eight columns of two rows of the block with those of
// two virtual rows: twice as much, once entries of two steps are zipped.
#pragma once

#include "activations.h"

namespace precalib {
namespace {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kHasMatrix = true;
#else
constexpr bool kHasMatrix = false;
#endif

// Sums of four rows of a block for kVirtual virtual rows of x.
template <int kVirtual, bool kMatrix>
struct PartSums {
  I32x4 sums[kVirtual] = {};

  // Adds eight steps. x: the first virtual row's values for these steps.
  [[gnu::always_inline]] void add(const I8x16* entries, const int8_t* x, int64_t columns) {
    for (int v = 0; v < kVirtual; ++v) {
      const I8x16 low = load<I8x16>(x + v * columns), high = load<I8x16>(x + v * columns + 16);
      I32x4& sum = sums[v];
      sum = add_dot4<0>(sum, entries[0], low);
      sum = add_dot4<1>(sum, entries[1], low);
      sum = add_dot4<2>(sum, entries[2], low);
      sum = add_dot4<3>(sum, entries[3], low);
      sum = add_dot4<0>(sum, entries[4], high);
      sum = add_dot4<1>(sum, entries[5], high);
      sum = add_dot4<2>(sum, entries[6], high);
      sum = add_dot4<3>(sum, entries[7], high);
    }
  }
  I32x4 of(int v) const { return sums[v]; }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int kVirtual>
struct PartSums<kVirtual, true> {
  static constexpr int kPairs = (kVirtual + 1) / 2;
  I32x4 low[kPairs] = {}, high[kPairs] = {};  // of the first two rows, and of the last two

  [[gnu::always_inline]] void add(const I8x16* entries, const int8_t* x, int64_t columns) {
    for (int i = 0; i < 4; ++i) {
      const I8x16 first = zip_low(entries[2 * i], entries[2 * i + 1]);
      const I8x16 last = zip_high(entries[2 * i], entries[2 * i + 1]);
      for (int p = 0; p < kPairs; ++p) {
        const I8x16 inputs = load<I8x16>(x + p * 2 * columns + 16 * i);
        low[p] = add_2x2(low[p], first, inputs);
        high[p] = add_2x2(high[p], last, inputs);
      }
    }
  }
  I32x4 of(int v) const {
    return v % 2 ? odd_lanes(low[v / 2], high[v / 2]) : even_lanes(low[v / 2], high[v / 2]);
  }
};
#endif

// Stores eight steps of entries of part p in a panel, in the order in which `TileSums` reads them:
// 128 bytes for two steps.
template <bool kMatrix>
[[gnu::always_inline]] inline void store_entries(const I8x16* entries, int part, int8_t* panel) {
  for (int i = 0; i < 4; ++i) {
    const I8x16 a = entries[2 * i], b = entries[2 * i + 1];
    int8_t* const to = panel + i * 2 * kVector;
    store(to + 16 * part * (kMatrix ? 2 : 1), kMatrix ? zip_low(a, b) : a);
    store(to + (kMatrix ? 32 * part + 16 : kVector + 16 * part), kMatrix ? zip_high(a, b) : b);
  }
}

// Sums of a block for kVirtual virtual rows of x, from a panel of entries.
template <int kVirtual, bool kMatrix>
struct TileSums {
  I32x4 sums[kVirtual][kParts] = {};

  [[gnu::always_inline]] void add(const int8_t* panel, int64_t steps, const int8_t* x,
                                  int64_t columns) {
    for (int64_t t = 0; t < steps; t += 4) {
      I8x16 inputs[kVirtual];
      for (int v = 0; v < kVirtual; ++v) inputs[v] = load<I8x16>(x + v * columns + 4 * t);
      add_step<0>(panel + t * kVector, inputs);
      add_step<1>(panel + (t + 1) * kVector, inputs);
      add_step<2>(panel + (t + 2) * kVector, inputs);
      add_step<3>(panel + (t + 3) * kVector, inputs);
    }
  }
  I32x4 of(int v, int part) const { return sums[v][part]; }

 private:
  template <int kStep>
  [[gnu::always_inline]] void add_step(const int8_t* panel, const I8x16* inputs) {
    for (int p = 0; p < kParts; ++p) {
      const I8x16 entries = load<I8x16>(panel + 16 * p);
      for (int v = 0; v < kVirtual; ++v)
        sums[v][p] = add_dot4<kStep>(sums[v][p], entries, inputs[v]);
    }
  }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int kVirtual>
struct TileSums<kVirtual, true> {
  static constexpr int kPairs = kVirtual / 2;
  I32x4 sums[kPairs][2 * kParts] = {};

  [[gnu::always_inline]] void add(const int8_t* panel, int64_t steps, const int8_t* x,
                                  int64_t columns) {
    for (int64_t t = 0; t < steps; t += 2) {
      I8x16 inputs[kPairs];
      for (int p = 0; p < kPairs; ++p) inputs[p] = load<I8x16>(x + p * 2 * columns + 8 * t);
      for (int i = 0; i < 2 * kParts; ++i) {
        const I8x16 entries = load<I8x16>(panel + t * kVector + 16 * i);
        for (int p = 0; p < kPairs; ++p) sums[p][i] = add_2x2(sums[p][i], entries, inputs[p]);
      }
    }
  }
  I32x4 of(int v, int part) const {
    const I32x4 low = sums[v / 2][2 * part], high = sums[v / 2][2 * part + 1];
    return v % 2 ? odd_lanes(low, high) : even_lanes(low, high);
  }
};
#endif

}  // namespace
}  // namespace precalib
