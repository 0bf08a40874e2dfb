// One call as the kernels see it: its sizes, its activations, and how results are stored.
#pragma once

#include "salient.h"

namespace precalib {
namespace {

constexpr int64_t kSlabRows = 256;        // rows of x that are prepared at a time
constexpr int64_t kThreadWork = 1 << 19;  // multiply-adds for which one thread is enough

// A call and what follows from it. `variants` counts the versions of x: with column scales, each
// shard has its own.
struct Problem {
  const Call& call;
  const PackedLayout& layout;
  int64_t blocks = 0, outputs = 0, variants;
  bool single_thread;  // too little work for more

  explicit Problem(const Call& call)
      : call(call), layout(*call.layout), variants(layout.column_scale ? layout.shard_count : 1) {
    for (int64_t p = 0; p < layout.shard_count; ++p) {
      blocks += count_blocks(layout, p);
      outputs += layout.shard_rows[p];
    }
    single_thread = call.rows * layout.columns * outputs <= kThreadWork;
  }
  const uint16_t* column_scale(int64_t variant) const {
    if (!layout.column_scale) return nullptr;
    return (const uint16_t*)(call.packed + layout.column_offset) + variant * layout.columns;
  }
  int64_t variant(const Block& block) const { return layout.column_scale ? block.shard : 0; }
};

// Memory for `tiles` tiles of x in all variants.
template <bool kMatrix, int kSplits>
class InputBuffers {
 public:
  InputBuffers(const Problem& problem, int64_t tiles)
      : problem_(problem),
        rows_(tiles * kTile),
        splits_(problem.variants * rows_ * kSplits * problem.layout.columns),
        groups_(problem.variants * rows_ * problem.layout.groups),
        tiles_(problem.variants * tiles * tile_size(problem.layout)) {}

  // Prepares a tile of the rows from `first` on. scratch: [kTile][columns].
  void prepare(int64_t first, int64_t variant, int64_t tile, float* scratch) const {
    const PackedLayout& layout = problem_.layout;
    const int64_t row = first + tile * kTile;
    prepare_tile<kMatrix, kSplits>(layout, problem_.call, problem_.column_scale(variant), row,
                                   min(kTile, problem_.call.rows - row), tile, scratch,
                                   splits_.data + variant * split_size(),
                                   groups_.data + variant * rows_ * layout.groups,
                                   tiles_.data + variant * rows_ / kTile * tile_size(layout));
  }
  Inputs of(int64_t variant) const {
    const PackedLayout& layout = problem_.layout;
    return {splits_.data + variant * split_size(), groups_.data + variant * rows_ * layout.groups,
            tiles_.data + variant * rows_ / kTile * tile_size(layout)};
  }

 private:
  int64_t split_size() const { return rows_ * kSplits * problem_.layout.columns; }
  const Problem& problem_;
  const int64_t rows_;
  const Buffer<int8_t> splits_;
  const Buffer<QuantizedGroup> groups_;
  const Buffer<float> tiles_;
};

// totals [4] += the product of a group and a row of x, from the sum of its codebook entries.
inline void add_scaled(F32x4 dot, F32x4 scale, F32x4 zero, const QuantizedGroup& quantized,
                       float* totals) {
  const F32x4 product = dot - zero * quantized.total;
  store(totals, fused_add(load<F32x4>(totals), product, scale * quantized.unit));
}

// Adds the bias and stores rows [first, first + rows) of a block's results. totals: [rows][16].
template <Type kType>
inline void store_typed(const Problem& problem, const Block& block, int64_t first, int64_t rows,
                        const float* totals) {
  constexpr int64_t kSize = kType == kFloat32 ? 4 : 2;
  alignas(64) char line[kLanes * 4] = {};
  F32x16 bias = {};
  if (problem.call.bias) {
    std::memcpy(line, (const char*)problem.call.bias + block.first_row * kSize,
                size_t(block.rows * kSize));
    for (int p = 0; p < kParts; ++p) bias.part[p] = load_floats<kType>(line, p * kPart);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int p = 0; p < kParts; ++p) {
      const F32x4 sum = load<F32x4>(totals + r * kLanes + p * kPart) + bias.part[p];
      char* const at = line + p * kPart * kSize;
      if constexpr (kType == kFloat32) store(at, sum);
      else if constexpr (kType == kFloat16) store(at, to_fp16(sum));
      else store(at, to_bf16(sum));
    }
    std::memcpy((char*)problem.call.y + ((first + r) * problem.outputs + block.first_row) * kSize,
                line, size_t(block.rows * kSize));
  }
}

inline void store_totals(const Problem& problem, const Block& block, int64_t first, int64_t rows,
                         const float* totals) {
  switch (problem.call.type) {
    case kFloat32: return store_typed<kFloat32>(problem, block, first, rows, totals);
    case kFloat16: return store_typed<kFloat16>(problem, block, first, rows, totals);
    default: return store_typed<kBfloat16>(problem, block, first, rows, totals);
  }
}

}  // namespace
}  // namespace precalib
