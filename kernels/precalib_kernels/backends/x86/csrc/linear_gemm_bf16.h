// Drivers of the BF16 GEMMs.
#pragma once

#include "gemm_bf16_register.h"
#include "panel_dequantized.h"
#include "panel_unscaled.h"
#include "salient_sums.h"

#if defined(__AVX512BF16__)

namespace precalib {
namespace {

constexpr int64_t kUnscaledPairs = 2;     // pairs of blocks of one task: unscaled panels,
constexpr int64_t kDequantizedPairs = 8;  // dequantized panels

// x in bfloat16, times column scales, in the tiles of `permute_to_panels`.
class Bf16Activations {
 public:
  Bf16Activations(const Problem& problem, int64_t panel, int64_t slab)
      : problem_(problem),
        groups_at_once_(panel),
        size_(slab * problem.layout.columns),
        x_(problem.variants * size_),
        scales_(problem.layout.column_scale ? problem.variants * problem.layout.columns : 0) {
    for (int64_t v = 0; problem.layout.column_scale && v < problem.variants; ++v)
      permute_scales(problem.layout, problem.column_scale(v),
                     scales_.data + v * problem.layout.columns);
  }

  // Prepares rows [first, first + rows); to be called by all threads of a team.
  void set(int64_t first, int64_t rows) {
    const X86Layout& layout = problem_.layout;
#pragma omp for
    for (int64_t i = 0; i < problem_.variants * rows; ++i) {
      const int64_t variant = i / rows, row = i % rows;
      permute_to_panels(layout, groups_at_once_,
                        (const uint16_t*)problem_.call.x + (first + row) * layout.columns,
                        layout.column_scale ? scales_.data + variant * layout.columns : nullptr,
                        row, rows, x_.data + variant * size_);
    }
  }
  const uint16_t* of(int64_t variant) const { return x_.data + variant * size_; }

 private:
  const Problem& problem_;
  const int64_t groups_at_once_, size_;
  const Buffer<uint16_t> x_;
  const Buffer<float> scales_;
};

template <class PanelPolicy>
void run_gemm_bf16_panel(const Problem& problem) {
  const X86Layout& layout = problem.layout;
  const int64_t slab = min(kSlabRows, padded_rows(problem.call.rows));
  const int64_t pairs = count_pairs(layout);
  const int64_t task_pairs =
      pairs_per_task(problem, PanelPolicy::kDequantized ? kDequantizedPairs : kUnscaledPairs);
  const int64_t panel = PanelPolicy::panel_columns(layout);
  Bf16Activations x(problem, panel, slab);
#pragma omp parallel if (!problem.single_thread)
  {
    const AmxTiles registers(problem.call.rows);
    Buffer<float> totals(task_pairs * 2 * slab * kLanes);
    Buffer<WorkItem> items(task_pairs);
    Buffer<uint16_t> weights(4 * panel * kLanes);
    PairRange range(task_pairs);
    for (int64_t first = 0; first < problem.call.rows; first += slab) {
      const int64_t rows = min(slab, problem.call.rows - first);
      x.set(first, rows);
#pragma omp for
      for (int64_t at = 0; at < pairs; at += task_pairs) {
        range.assign(problem, at);
        int64_t count = 0;
        range.for_each<2>([&]<int kBlocks>(int64_t p, const Block* blocks, int) {
          items.data[count++] = {blocks, kBlocks, x.of(problem.variant(*blocks)),
                                 totals.data + 2 * p * slab * kLanes};
        });
        multiply_panels<PanelPolicy>(layout, items.data, count, rows, weights.data);
        range.for_each<2>([&]<int kBlocks>(int64_t p, const Block* blocks, int) {
          store_tiles<kBlocks>(problem, blocks, first, rows, totals.data + 2 * p * slab * kLanes);
        });
      }
    }
  }
}

#if !defined(__AMX_BF16__)

template <int kBits>
void run_gemm_bf16_register(const Problem& problem) {
  constexpr int64_t kSize = kTile * kLanes;
  const X86Layout& layout = problem.layout;
  const int64_t rows = problem.call.rows;
  const int64_t pairs = count_pairs(layout), task_pairs = pairs_per_task(problem, kTaskPairs);
  Bf16Activations x(problem, min(layout.group_size, layout.columns), kTile);
  const Buffer<float> columns(problem.variants * layout.columns * kTile);
  const Buffer<float> input_sums(problem.variants * layout.groups * kTile);
#pragma omp parallel if (!problem.single_thread)
  {
    const Bf16Codebook<kBits> codebook(layout);
    PairRange range(task_pairs);
    Buffer<float> totals(task_pairs * 2 * kSize);
    SalientSums salient(layout, task_pairs, 1);
    x.set(0, rows);
#pragma omp for
    for (int64_t i = 0; i < problem.variants * layout.groups; ++i)
      transpose_columns(layout, x.of(i / layout.groups), i % layout.groups,
                        columns.data + i / layout.groups * layout.columns * kTile,
                        input_sums.data + i * kTile);
#pragma omp for
    for (int64_t at = 0; at < pairs; at += task_pairs) {
      range.assign(problem, at);
      range.for_each<1>([&]<int>(int64_t p, const Block* block, int b) {
        const int64_t variant = problem.variant(*block);
        const float* const sums = input_sums.data + variant * layout.groups * kTile;
        float* const to = totals.data + (2 * p + b) * kSize;
        if (rows <= 12)
          register_block<kBits, 12>(layout, *block, x.of(variant), sums, codebook, to);
        else register_block<kBits, kTile>(layout, *block, x.of(variant), sums, codebook, to);
      });
      salient.compute(range, rows, [&](const Block& block, int64_t) {
        return columns.data + problem.variant(block) * layout.columns * kTile;
      });
      range.for_each<2>([&]<int kBlocks>(int64_t p, const Block* blocks, int) {
        float* const to = totals.data + 2 * p * kSize;
        salient.add<kBlocks>(p, 0, rows, to);
        store_tiles<kBlocks>(problem, blocks, 0, rows, to);
      });
    }
  }
}

#endif

}  // namespace
}  // namespace precalib

#endif
