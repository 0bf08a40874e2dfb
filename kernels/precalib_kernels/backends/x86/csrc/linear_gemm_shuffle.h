// Driver of the GEMMs for ISAs without VBMI.
#pragma once

#include "gemm_fp32.h"
#include "gemm_shuffle.h"
#include "linear_problem.h"
#include "salient_columns.h"

#if !defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int64_t kShuffleSlabRows = 96;  // rows of x that are prepared at a time
constexpr int64_t kShuffleTaskBlocks = 16;
constexpr int64_t kSalientColumns = 1024;  // about: columns of x that stay in the caches

// Memory of x as a GEMM reads it, for one slab.
template <class Product>
class SlabInputs {
 public:
  SlabInputs(const Problem& problem, int64_t slab, float largest)
      : problem_(problem),
        slab_(slab),
        largest_(largest),
        padded_(problem.layout.groups * problem.layout.group_size),
        values_(problem.variants * slab * padded_),
        units_(problem.variants * problem.layout.groups * slab),
        totals_(problem.variants * problem.layout.groups * slab),
        starts_(problem.variants * problem.layout.groups * slab),
        columns_(problem.layout.salient_count ? problem.variants * tiles() * tile_size() : 0) {}

  Inputs<Product> of(const Block& block) const { return of(problem_.variant(block)); }
  Inputs<Product> of(int64_t variant) const {
    const int64_t groups = variant * problem_.layout.groups * slab_;
    return {values_.data + variant * slab_ * padded_, units_.data + groups, totals_.data + groups,
            starts_.data + groups, columns_.data + variant * tiles() * tile_size()};
  }

  // Prepares a row of the slab. permuted: [columns].
  void set(int64_t variant, int64_t row, const float* permuted) const {
    const X86Layout& layout = problem_.layout;
    const Inputs<Product> out = of(variant);
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t first = g * layout.group_size, at = g * slab_ + row;
      const auto quantized =
          quantize_for<Product>(permuted + first, min(layout.group_size, layout.columns - first),
                                out.values + at * layout.group_size, 0, largest_);
      out.units[at] = quantized.unit;
      out.totals[at] = quantized.total;
      out.starts[at] = quantized.start[0];
    }
    if (!layout.salient_count) return;
    float* const to = out.columns + row / kPartRows * tile_size() + row % kPartRows;
    for (int64_t k = 0; k < layout.columns; ++k) to[k * kPartRows] = permuted[k];
  }

  int64_t tile_size() const { return problem_.layout.columns * kPartRows; }

 private:
  int64_t tiles() const { return (slab_ + kPartRows - 1) / kPartRows; }
  const Problem& problem_;
  const int64_t slab_;
  const float largest_;
  const int64_t padded_;
  const Buffer<typename Product::Split> values_;
  const Buffer<float> units_, totals_;
  const Buffer<int32_t> starts_;
  const Buffer<float> columns_;
};

// Some blocks of weights times a slab of x. totals: [block][slab][16], accumulated.
template <int kBits, bool kTrellis, class Product>
class ShuffleTask {
 public:
  ShuffleTask(const Problem& problem, const EntryBytes& bytes, int64_t slab)
      : layout_(problem.layout),
        bytes_(bytes),
        slab_(slab),
        table_(problem.layout, bytes),
        groups_at_once_(kSalientColumns / problem.layout.group_size + 1),
        panel_(min(problem.layout.group_size, problem.layout.columns) / 4 * Product::kVectors *
               kVector),
        salient_(groups_at_once_ * problem.layout.salient_count) {}

  void multiply(const Block* blocks, int64_t count, const SlabInputs<Product>& x, int64_t rows,
                float* totals) const {
    for (int64_t first = 0; first < layout_.groups; first += groups_at_once_) {
      const int64_t last = min(first + groups_at_once_, layout_.groups);
      for (int64_t g = first; g < last; ++g)
        for (int64_t b = 0; b < count; ++b) {
          const Group group = find_group(layout_, blocks[b], g);
          prefetch_metadata(layout_, group, 1);
          unpack_entries<kBits, kTrellis, Product>(table_, group, layout_.block_bytes, panel_.data);
          SumScales by[kParts];
          for (int p = 0; p < kParts; ++p)
            by[p] = sum_scales<Product>(
                bytes_, group_scales<NativeLanes>(layout_, blocks[b], group, p * kPartRows),
                group_zeros<NativeLanes>(layout_, group, p * kPartRows));
          multiply_group<Product>(panel_.data, group, by, x.of(blocks[b]), layout_.group_size, g,
                                  slab_, rows, totals + b * slab_ * kLanes);
        }
      if (!layout_.salient_count) continue;
      for (int64_t b = 0; b < count; ++b) {
        find_salient_columns(layout_, blocks[b], first, last, salient_.data);
        for (int64_t r = 0; r < rows; r += kPartRows)
          add_salient_columns(salient_.data, (last - first) * layout_.salient_count,
                              x.of(blocks[b]).columns + r / kPartRows * x.tile_size(),
                              min(kPartRows, rows - r), totals + (b * slab_ + r) * kLanes);
      }
    }
  }

 private:
  const X86Layout& layout_;
  const EntryBytes& bytes_;
  const int64_t slab_;
  const LevelTable<kBits, kTrellis> table_;
  const int64_t groups_at_once_;
  const Buffer<uint8_t> panel_;
  const Buffer<SalientColumn> salient_;
};

// Rows of x in float32, for one slab: [group][row][group_size].
inline void set_fp32(const X86Layout& layout, int64_t slab, int64_t row, const float* permuted,
                     float* values) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t first = g * layout.group_size;
    std::memcpy(values + (g * slab + row) * layout.group_size, permuted + first,
                size_t(min(layout.group_size, layout.columns - first)) * sizeof(float));
  }
}

// Blocks of a task: few enough that each thread has several tasks.
inline int64_t blocks_per_task(const Problem& problem) {
  const int64_t most =
      problem.single_thread ? problem.blocks : problem.blocks / (4 * omp_get_max_threads());
  return most < 1 ? 1 : min(most, kShuffleTaskBlocks);
}

// Calls prepare(variant, row of the slab, row of x, permuted row) for all rows of a slab, then
// multiply(first block, count, rows, totals) for all tasks, and stores totals [block][slab][16].
template <class Prepare, class Multiply>
void for_slabs(const Problem& problem, int64_t slab, Prepare&& prepare, Multiply&& multiply) {
  const int64_t task = blocks_per_task(problem), rows = problem.call.rows;
  Buffer<float> permuted(problem.layout.columns), totals(task * slab * kLanes);
  Buffer<Block> blocks(task);
  for (int64_t first = 0; first < rows; first += slab) {
    const int64_t there = min(slab, rows - first);
#pragma omp for
    for (int64_t i = 0; i < problem.variants * there; ++i) {
      problem.permute(first + i % there, i / there, permuted.data);
      prepare(i / there, i % there, permuted.data);
    }
#pragma omp for
    for (int64_t at = 0; at < problem.blocks; at += task) {
      const int64_t count = min(task, problem.blocks - at);
      for (int64_t b = 0; b < count; ++b)
        blocks.data[b] = find_block(problem.layout, problem.call.packed, at + b);
      std::memset(totals.data, 0, size_t(count * slab * kLanes) * sizeof(float));
      multiply(blocks.data, count, there, totals.data);
      for (int64_t b = 0; b < count; ++b)
        store_sums(problem, blocks.data[b], first, there, totals.data + b * slab * kLanes);
    }
  }
}

template <int kBits, bool kTrellis, class Product>
void run_gemm_shuffle(const Problem& problem, const EntryBytes& bytes = {},
                      float largest = kLargestSplit<1, typename Product::Split>) {
  const int64_t slab = min(kShuffleSlabRows, problem.call.rows);
  const SlabInputs<Product> x(problem, slab, largest);
#pragma omp parallel if (!problem.single_thread)
  {
    const ShuffleTask<kBits, kTrellis, Product> kernel(problem, bytes, slab);
    for_slabs(
        problem, slab,
        [&](int64_t variant, int64_t row, const float* from) { x.set(variant, row, from); },
        [&](const Block* blocks, int64_t count, int64_t rows, float* totals) {
          kernel.multiply(blocks, count, x, rows, totals);
        });
  }
}

template <int kBits, bool kTrellis>
void run_gemm_fp32(const Problem& problem) {
  const X86Layout& layout = problem.layout;
  const int64_t slab = min(kShuffleSlabRows, problem.call.rows);
  const int64_t size = slab * layout.groups * layout.group_size;
  const Buffer<float> x(problem.variants * size);
#pragma omp parallel if (!problem.single_thread)
  {
    const LevelTable<kBits, kTrellis> table(layout, [](int8_t entry) { return entry; });
    const Buffer<float> weights(min(layout.group_size, layout.columns) * kLanes);
    for_slabs(
        problem, slab,
        [&](int64_t variant, int64_t row, const float* from) {
          set_fp32(layout, slab, row, from, x.data + variant * size);
        },
        [&](const Block* blocks, int64_t count, int64_t rows, float* totals) {
          for (int64_t g = 0; g < layout.groups; ++g)
            for (int64_t b = 0; b < count; ++b) {
              const Group group = find_group(layout, blocks[b], g);
              dequantize_group<kBits>(layout, blocks[b], group, table, weights.data);
              multiply_panel_fp32(
                  weights.data, group.columns,
                  x.data + problem.variant(blocks[b]) * size + g * slab * layout.group_size,
                  layout.group_size, rows, totals + b * slab * kLanes);
            }
        });
  }
}

}  // namespace
}  // namespace precalib

#endif
