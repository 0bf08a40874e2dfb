// The kernels of one level of instructions; PRECALIB_LEVEL names it and -m flags set it.
#include <omp.h>

#include <cstdlib>

#include "dot.h"
#include "tile.h"

namespace precalib {
namespace {

constexpr int64_t kSlabRows = 512;        // rows of x that are held arranged at a time
constexpr int64_t kThreadWork = 1 << 19;  // products for which one thread is enough

// Memory of one call or thread.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count)
      : data((T*)std::aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64)) {
    if (data == nullptr) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// A call, and what all of its ways to compute share.
struct Work {
  const Call& call;
  const Plan& plan;
  int64_t blocks, outputs = 0, variants;
  bool alone;  // too little for more than one thread

  explicit Work(const Call& call)
      : call(call), plan(*call.plan), blocks(count_blocks(plan)),
        variants(plan.column_scale ? plan.part_count : 1) {
    for (int64_t p = 0; p < plan.part_count; ++p) outputs += plan.part_rows[p];
    alone = call.rows * plan.columns * outputs <= kThreadWork;
  }
  const uint16_t* column_scale(int64_t variant) const {
    if (!plan.column_scale) return nullptr;
    return (const uint16_t*)(call.packed + plan.column_offset) + variant * plan.columns;
  }
  int64_t variant(const Block& block) const { return plan.column_scale ? block.part : 0; }
  void arrange(int64_t row, int64_t variant, float* out) const {
    arrange_row(plan, call.x, row, call.type, column_scale(variant), out);
  }
};

Floats load_bias(const Call& call, const Block& block) {
  if (call.bias == nullptr) return Floats{};
  const int64_t size = call.type == kFloat32 ? 4 : 2;
  char padded[kLanes * 4] = {};
  std::memcpy(padded, (const char*)call.bias + block.first_row * size, size_t(block.rows * size));
  return load_floats(padded, 0, call.type);
}

// sums: [rows][16] of rows [first, first + rows) of x.
void store_sums(const Work& work, const Block& block, int64_t first, int64_t rows,
                const float* sums) {
  const Floats bias = load_bias(work.call, block);
  for (int64_t r = 0; r < rows; ++r)
    store_floats(work.call.y, (first + r) * work.outputs + block.first_row,
                 load<Floats>(sums + r * kLanes) + bias, block.rows, work.call.type);
}

template <int kBits>
void run_plain(const Work& work) {
  const Plan& plan = work.plan;
  const int64_t slab = smaller(kSlabRows, work.call.rows);
  Buffer<float> arranged(work.variants * slab * plan.columns);
#pragma omp parallel if (!work.alone)
  {
    Buffer<float> weights(smaller(plan.group_size, plan.columns) * kLanes), sums(slab * kLanes);
    for (int64_t first = 0; first < work.call.rows; first += slab) {
      const int64_t rows = smaller(slab, work.call.rows - first);
#pragma omp for
      for (int64_t i = 0; i < work.variants * rows; ++i)
        work.arrange(first + i % rows, i / rows,
                     arranged.data + (i / rows * slab + i % rows) * plan.columns);
#pragma omp for
      for (int64_t b = 0; b < work.blocks; ++b) {
        const Block block = find_block(plan, work.call.packed, b);
        plain_block<kBits>(plan, block, arranged.data + work.variant(block) * slab * plan.columns,
                           rows, weights.data, sums.data);
        store_sums(work, block, first, rows, sums.data);
      }
    }
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

template <int kBits, int kDigits, int kRows>
void run_dot(const Work& work) {
  const Plan& plan = work.plan;
  const int64_t count = work.variants * kRows;
  Buffer<float> arranged(count * plan.columns + 256);
  Buffer<int8_t> digits(count * kDigits * plan.columns);
  Buffer<Fixed<kDigits>> groups(count * plan.groups);
  for (int64_t i = 0; i < count; ++i) {
    float* const x = arranged.data + i * plan.columns;
    work.arrange(i % kRows, i / kRows, x);
    to_fixed<kDigits>(plan, x, digits.data + i * kDigits * plan.columns,
                      groups.data + i * plan.groups);
  }
#pragma omp parallel for if (!work.alone)
  for (int64_t b = 0; b < work.blocks; ++b) {
    const Block block = find_block(plan, work.call.packed, b);
    const int64_t first = work.variant(block) * kRows;
    alignas(64) float sums[kRows * kLanes];
    dot_block<kBits, kDigits, kRows>(plan, block, arranged.data + first * plan.columns,
                                     digits.data + first * kDigits * plan.columns,
                                     groups.data + first * plan.groups, sums);
    store_sums(work, block, 0, kRows, sums);
  }
}

template <int kBits, int kDigits>
void choose_dot(const Work& work) {
  switch (work.call.rows) {
    case 1: return run_dot<kBits, kDigits, 1>(work);
    case 2: return run_dot<kBits, kDigits, 2>(work);
    case 3: return run_dot<kBits, kDigits, 3>(work);
    default: return run_dot<kBits, kDigits, 4>(work);
  }
}

#endif

#if defined(__AVX512BF16__)

template <int kBits>
void run_tiles(const Work& work) {
  const Plan& plan = work.plan;
  const int64_t slab = smaller(kSlabRows, (work.call.rows + kTile - 1) / kTile * kTile);
  const int64_t pairs = (work.blocks + 1) / 2;
  Buffer<uint16_t> x(work.variants * slab * plan.columns);
  Buffer<float> row_sums(plan.uniform ? work.variants * slab * plan.groups : 0);
#pragma omp parallel if (!work.alone)
  {
    const Tiles tiles(work.call.rows);
    Buffer<float> arranged(plan.columns), totals(2 * slab * kLanes);
    Buffer<uint16_t> levels(2 * smaller(plan.group_size, plan.columns) * kLanes);
    for (int64_t first = 0; first < work.call.rows; first += slab) {
      const int64_t rows = smaller(slab, work.call.rows - first);
#pragma omp for
      for (int64_t i = 0; i < work.variants * rows; ++i) {
        work.arrange(first + i % rows, i / rows, arranged.data);
        to_tiles(plan, arranged.data, i % rows, x.data + i / rows * slab * plan.columns);
        if (plan.uniform)
          sum_groups(plan, arranged.data, row_sums.data + (i / rows * slab + i % rows) * plan.groups);
      }
#pragma omp for
      for (int64_t pair = 0; pair < pairs; ++pair) {
        Block blocks[2];
        const int count = int(smaller(2, work.blocks - 2 * pair));
        for (int b = 0; b < count; ++b) blocks[b] = find_block(plan, work.call.packed, 2 * pair + b);
        const auto multiply = [&]<int kBlocks>(const Block* those) {
          const int64_t at = work.variant(those[0]) * slab;
          tile_blocks<kBits, kBlocks>(plan, those, x.data + at * plan.columns,
                                      row_sums.data + at * plan.groups, rows, levels.data,
                                      totals.data);
          const int64_t padded = (rows + kTile - 1) / kTile * kTile;
          for (int b = 0; b < kBlocks; ++b)
            store_sums(work, those[b], first, rows, totals.data + b * padded * kLanes);
        };
        if (count == 2 && work.variant(blocks[0]) == work.variant(blocks[1])) {
          multiply.template operator()<2>(blocks);
        } else {
          for (int b = 0; b < count; ++b) multiply.template operator()<1>(blocks + b);
        }
      }
    }
  }
}

#endif

template <int kBits>
void choose(const Work& work) {
  [[maybe_unused]] const bool rounded = work.call.type == kBfloat16;
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
  if (work.call.rows <= kDotRows)
    return work.call.type == kFloat32 ? choose_dot<kBits, 3>(work) : choose_dot<kBits, 2>(work);
#endif
#if defined(__AVX512BF16__)
  if (rounded) return run_tiles<kBits>(work);
#endif
  return run_plain<kBits>(work);
}

}  // namespace

namespace PRECALIB_LEVEL {

void run(const Call& call) {
  if (call.rows == 0) return;
  const Work work(call);
  switch (work.plan.bits) {
    case 2: return choose<2>(work);
    case 3: return choose<3>(work);
    case 4: return choose<4>(work);
    case 5: return choose<5>(work);
  }
}

}  // namespace PRECALIB_LEVEL
}  // namespace precalib
