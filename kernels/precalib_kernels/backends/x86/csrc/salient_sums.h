// Salient residuals of a range of blocks, summed in a pass of their own.
#pragma once

#include "linear_problem.h"
#include "salient_residual.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

namespace precalib {
namespace {

constexpr int64_t kResidualColumns = 1024;  // about: columns of x that stay in the caches

// Sums of salient residuals times x, for the blocks of a task.
class SalientSums {
 public:
  SalientSums(const X86Layout& layout, int64_t task_pairs, int64_t row_tiles)
      : layout_(layout),
        row_tiles_(row_tiles),
        groups_at_once_(kResidualColumns / layout.group_size + 1),
        sums_(layout.salient_count ? 2 * task_pairs * row_tiles * kSize : 0),
        residuals_(groups_at_once_ * layout.salient_count) {}

  // columns(block, tile): x transposed, [column][16], for the rows of a tile.
  template <class Columns>
  void compute(const PairRange& range, int64_t rows, Columns&& columns) {
    if (!layout_.salient_count) return;
    std::memset(sums_.data, 0, size_t(2 * range.count * row_tiles_ * kSize) * sizeof(float));
    // Some groups of x, which stay in the caches, serve all blocks before the next ones.
    for (int64_t g = 0; g < layout_.groups; g += groups_at_once_)
      range.for_each<1>([&]<int>(int64_t p, const Block* block, int b) {
        const int64_t end = min(g + groups_at_once_, layout_.groups);
        find_residuals(layout_, *block, g, end, residuals_.data);
        for (int64_t t = 0; t * kTile < rows; ++t)
          add_residuals(residuals_.data, (end - g) * layout_.salient_count, columns(*block, t),
                        at(p, b, t));
      });
  }

  // Adds the sums to totals of the blocks of pair p from b on, [tile of rows][kBlocks][16][16].
  template <int kBlocks>
  void add(int64_t p, int b, int64_t rows, float* totals) const {
    if (!layout_.salient_count) return;
    for (int64_t t = 0; t * kTile < rows; ++t)
      for (int c = 0; c < kBlocks; ++c)
        add_transposed(at(p, b + c, t), min(kTile, rows - t * kTile),
                       totals + (t * kBlocks + c) * kSize);
  }

 private:
  static constexpr int64_t kSize = kTile * kLanes;
  float* at(int64_t p, int b, int64_t tile) const {
    return sums_.data + ((2 * p + b) * row_tiles_ + tile) * kSize;
  }
  const X86Layout& layout_;
  const int64_t row_tiles_, groups_at_once_;
  const Buffer<float> sums_;
  const Buffer<SalientResidual> residuals_;
};

}  // namespace
}  // namespace precalib

#endif
