// Driver of the INT8 GEMV.
#pragma once

#include "gemv_int8.h"
#include "linear_problem.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

template <int kBits, int kSplits, int kRows>
void run_gemv_int8(const Problem& problem) {
  const X86Layout& layout = problem.layout;
  const int64_t count = problem.variants * kRows;
  Buffer<float> permuted(count * layout.columns + 256);
  Buffer<int8_t> splits(count * kSplits * layout.columns);
  Buffer<QuantizedGroup<kSplits>> groups(count * layout.groups);
  for (int64_t i = 0; i < count; ++i) {
    float* const x = permuted.data + i * layout.columns;
    problem.permute(i % kRows, i / kRows, x);
    quantize_group<kSplits>(layout, x, splits.data + i * kSplits * layout.columns,
                            groups.data + i * layout.groups);
  }
#pragma omp parallel for if (!problem.single_thread)
  for (int64_t b = 0; b < problem.blocks; ++b) {
    const Block block = find_block(layout, problem.call.packed, b);
    const int64_t first = problem.variant(block) * kRows;
    alignas(64) float sums[kRows * kLanes];
    gemv_block<kBits, kSplits, kRows>(layout, block, permuted.data + first * layout.columns,
                                      splits.data + first * kSplits * layout.columns,
                                      groups.data + first * layout.groups, sums);
    store_sums(problem, block, 0, kRows, sums);
  }
}

template <int kBits, int kSplits>
void choose_gemv_int8(const Problem& problem) {
  switch (problem.call.rows) {
    case 1: return run_gemv_int8<kBits, kSplits, 1>(problem);
    case 2: return run_gemv_int8<kBits, kSplits, 2>(problem);
    case 3: return run_gemv_int8<kBits, kSplits, 3>(problem);
    default: return run_gemv_int8<kBits, kSplits, kMaxGemvRows>(problem);
  }
}

}  // namespace
}  // namespace precalib

#endif
