// Driver of the FP32 GEMM.
#pragma once

#include "gemm_fp32.h"
#include "linear_problem.h"

namespace precalib {
namespace {

template <int kBits>
void run_gemm_fp32(const Problem& problem) {
  const X86Layout& layout = problem.layout;
  const int64_t slab = min(kSlabRows, problem.call.rows);
  Buffer<float> permuted(problem.variants * slab * layout.columns);
#pragma omp parallel if (!problem.single_thread)
  {
    Buffer<float> weights(min(layout.group_size, layout.columns) * kLanes), sums(slab * kLanes);
    for (int64_t first = 0; first < problem.call.rows; first += slab) {
      const int64_t rows = min(slab, problem.call.rows - first);
#pragma omp for
      for (int64_t i = 0; i < problem.variants * rows; ++i)
        problem.permute(first + i % rows, i / rows,
                        permuted.data + (i / rows * slab + i % rows) * layout.columns);
#pragma omp for
      for (int64_t b = 0; b < problem.blocks; ++b) {
        const Block block = find_block(layout, problem.call.packed, b);
        gemm_fp32_block<kBits>(layout, block,
                               permuted.data + problem.variant(block) * slab * layout.columns, rows,
                               weights.data, sums.data);
        store_sums(problem, block, first, rows, sums.data);
      }
    }
  }
}

}  // namespace
}  // namespace precalib
