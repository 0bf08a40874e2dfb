// Driver of the GEMV for ISAs without VBMI.
#pragma once

#include "gemv_shuffle.h"
#include "linear_problem.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

template <int kBits, bool kTrellis, class Product, int kRows>
void run_gemv_shuffle(const Problem& problem, const EntryBytes& bytes, float largest) {
  using Split = typename Product::Split;
  constexpr int kSplits = Product::kSplits;
  const X86Layout& layout = problem.layout;
  const int64_t count = problem.variants * kRows;
  Buffer<float> permuted(count * layout.columns);
  Buffer<Split> splits(count * kSplits * layout.columns);
  Buffer<QuantizedGroup<kSplits>> groups(count * layout.groups);
  for (int64_t i = 0; i < count; ++i) {
    float* const x = permuted.data + i * layout.columns;
    problem.permute(i % kRows, i / kRows, x);
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t first = g * layout.group_size;
      groups.data[i * layout.groups + g] = quantize_for<Product>(
          x + first, min(layout.group_size, layout.columns - first),
          splits.data + i * kSplits * layout.columns + first, layout.columns, largest);
    }
  }
  const LevelTable<kBits, kTrellis> table(layout, bytes);
#pragma omp parallel for if (!problem.single_thread)
  for (int64_t b = 0; b < problem.blocks; ++b) {
    const Block block = find_block(layout, problem.call.packed, b);
    const int64_t first = problem.variant(block) * kRows;
    alignas(64) float sums[kRows * kLanes];
    for (int part = 0; part < kParts; ++part)
      gemv_shuffle_part<kBits, kTrellis, Product, kRows>(
          layout, block, part, bytes, table, permuted.data + first * layout.columns,
          splits.data + first * kSplits * layout.columns, groups.data + first * layout.groups,
          sums);
    store_sums(problem, block, 0, kRows, sums);
  }
}

template <int kBits, bool kTrellis, class Product>
void choose_gemv_shuffle(const Problem& problem, const EntryBytes& bytes = {},
                         float largest = kLargestSplit<Product::kSplits, typename Product::Split>) {
  switch (problem.call.rows) {
    case 1: return run_gemv_shuffle<kBits, kTrellis, Product, 1>(problem, bytes, largest);
    case 2: return run_gemv_shuffle<kBits, kTrellis, Product, 2>(problem, bytes, largest);
    case 3: return run_gemv_shuffle<kBits, kTrellis, Product, 3>(problem, bytes, largest);
    default:
      return run_gemv_shuffle<kBits, kTrellis, Product, kMaxGemvRows>(problem, bytes, largest);
  }
}

}  // namespace
}  // namespace precalib

#endif
