// One call as all drivers see it: its sizes, its activations, how results are stored, and how its
// blocks of weights are dealt out to threads.
#pragma once

#include <omp.h>

#include "activations.h"
#include "amx_tiles.h"
#include "isa_dispatch.h"

namespace precalib {
namespace {

constexpr int64_t kSlabRows = 512;        // rows of x that are prepared at a time
constexpr int64_t kTaskPairs = 8;         // pairs of blocks of one task
constexpr int64_t kThreadWork = 1 << 19;  // multiply-adds for which one thread is enough

// A call and what all drivers derive from it. `variants` counts the versions of x: with column
// scales, each shard has its own.
struct Problem {
  const Call& call;
  const X86Layout& layout;
  int64_t blocks, outputs = 0, variants;
  bool single_thread;  // too little work for more

  explicit Problem(const Call& call)
      : call(call),
        layout(*call.layout),
        blocks(count_blocks(layout)),
        variants(layout.column_scale ? layout.shard_count : 1) {
    for (int64_t p = 0; p < layout.shard_count; ++p) outputs += layout.shard_rows[p];
    single_thread = call.rows * layout.columns * outputs <= kThreadWork;
  }
  const uint16_t* column_scale(int64_t variant) const {
    if (!layout.column_scale) return nullptr;
    return (const uint16_t*)(call.packed + layout.column_offset) + variant * layout.columns;
  }
  int64_t variant(const Block& block) const { return layout.column_scale ? block.shard : 0; }
  void permute(int64_t row, int64_t variant, float* out) const {
    permute_row(layout, call.x, row, call.type, column_scale(variant), out);
  }
  // Permutes one group of up to sixteen rows of x to [16][group_size], zeros from `rows` on.
  void permute_tile(int64_t first, int64_t rows, int64_t variant, int64_t group, float* out) const {
    for (int64_t r = 0; r < rows; ++r)
      permute_group(layout, call.x, first + r, call.type, column_scale(variant),
                    group * layout.group_size, out + r * layout.group_size);
    std::memset(out + rows * layout.group_size, 0,
                size_t((kTile - rows) * layout.group_size) * sizeof(float));
  }
};

F32x16 load_bias(const Call& call, const Block& block) {
  if (call.bias == nullptr) return F32x16{};
  const int64_t size = call.type == kFloat32 ? 4 : 2;
  char padded[kLanes * 4] = {};
  std::memcpy(padded, (const char*)call.bias + block.first_row * size, size_t(block.rows * size));
  return load_floats(padded, 0, call.type);
}

// Adds the bias and stores rows [first, first + rows) of a block's results. sums: [rows][16].
void store_sums(const Problem& problem, const Block& block, int64_t first, int64_t rows,
                const float* sums) {
  const F32x16 bias = load_bias(problem.call, block);
  const int64_t outputs = problem.outputs, count = block.rows, type = problem.call.type;
  void* const y = problem.call.y;  // in locals, so that they are not read again after each store
  for (int64_t r = 0; r < rows; ++r)
    store_floats(y, (first + r) * outputs + block.first_row, load<F32x16>(sums + r * kLanes) + bias,
                 count, type);
}

// The same for kBlocks blocks. sums: [tile of rows][kBlocks][16][16].
template <int kBlocks>
void store_tiles(const Problem& problem, const Block* blocks, int64_t first, int64_t rows,
                 const float* sums) {
#if defined(__AVX512BF16__)
  if (kBlocks == 2 && blocks[1].rows == kLanes && problem.call.type == kBfloat16) {
    const F32x16 low = load_bias(problem.call, blocks[0]),
                 high = load_bias(problem.call, blocks[1]);
    const int64_t outputs = problem.outputs;
    uint16_t* const y = (uint16_t*)problem.call.y + first * outputs + blocks->first_row;
    for (int64_t r = 0; r < rows; ++r) {
      const float* const from = sums + (r / kTile * 2 * kTile + r % kTile) * kLanes;
      const F32x16 a = load<F32x16>(from) + low, b = load<F32x16>(from + kTile * kLanes) + high;
      store(y + r * outputs, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
    return;
  }
#endif
  for (int64_t r = 0; r < rows; r += kTile)
    for (int b = 0; b < kBlocks; ++b)
      store_sums(problem, blocks[b], first + r, min(kTile, rows - r),
                 sums + (r * kBlocks + b * kTile) * kLanes);
}

// A task: the pairs of blocks that a thread computes side by side.
struct PairRange {
  const int64_t size;
  int64_t count = 0;
  Buffer<Pair> pairs;

  explicit PairRange(int64_t size) : size(size), pairs(size) {}
  void assign(const Problem& problem, int64_t at) {
    count = min(size, count_pairs(problem.layout) - at);
    for (int64_t p = 0; p < count; ++p)
      pairs.data[p] = find_pair(problem.layout, problem.call.packed, at + p);
  }
  // Calls use<count>(pair of the range, blocks, place of the first block in its pair) for all
  // pairs: once per pair if kMost is 2, else once per block.
  template <int kMost, class Use>
  void for_each(Use&& use) const {
    for (int64_t p = 0; p < count; ++p) {
      const Pair& pair = pairs.data[p];
      if (pair.count == kMost) {
        use.template operator()<kMost>(p, pair.blocks, 0);
      } else {
        for (int b = 0; b < pair.count; ++b) use.template operator()<1>(p, pair.blocks + b, b);
      }
    }
  }
};

// Pairs of a task, at most `most`: few enough that each thread has several tasks.
[[maybe_unused]] int64_t pairs_per_task(const Problem& problem, int64_t most) {
  const int64_t per_thread =
      count_pairs(problem.layout) / (problem.single_thread ? 1 : 4 * omp_get_max_threads());
  return per_thread < 1 ? 1 : min(per_thread, most);
}

}  // namespace
}  // namespace precalib
