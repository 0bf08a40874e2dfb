// The kernels of one level of instructions; PRECALIB_LEVEL names it and -m flags set it.
#include <omp.h>

#include "gemm_int8.h"
#include "gemv_int8.h"
#include "gemm_bf16_register.h"
#include "panel_unscaled.h"
#include "panel_dequantized.h"
#include "gemm_fp32.h"

namespace precalib {
namespace {

constexpr int64_t kSlabRows = 512;        // rows of x that are held arranged at a time
constexpr int64_t kFewRows = 4;           // up to so many without tiles
constexpr int64_t kDigitSlab = 64;        // the same in fixed point, which takes more memory
constexpr int64_t kDigitRows = 32;        // bfloat16: up to so many rows in fixed point if uniform,
constexpr int64_t kLevelRows = 48;        // as levels if not; less with small groups
constexpr int64_t kChunkPairs = 8;        // pairs of blocks whose sums are held at a time
constexpr int64_t kLevelPairs = 2;        // the same where levels become bfloat16,
constexpr int64_t kMergePairs = 8;        // or weights
constexpr int64_t kSalientSpan = 1024;    // about: columns of inputs that stay in the caches
constexpr int64_t kThreadWork = 1 << 19;  // products for which one thread is enough

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
  // One group of up to sixteen rows to [16][group_size], zeros where there is no row.
  void arrange_tile(int64_t first, int64_t rows, int64_t variant, int64_t group, float* out) const {
    for (int64_t r = 0; r < rows; ++r)
      arrange_group(plan, call.x, first + r, call.type, column_scale(variant),
                    group * plan.group_size, out + r * plan.group_size);
    std::memset(out + rows * plan.group_size, 0,
                size_t((kTile - rows) * plan.group_size) * sizeof(float));
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
  const int64_t outputs = work.outputs, count = block.rows, type = work.call.type;
  void* const y = work.call.y;  // these are not read again after each store
  for (int64_t r = 0; r < rows; ++r)
    store_floats(y, (first + r) * outputs + block.first_row, load<Floats>(sums + r * kLanes) + bias,
                 count, type);
}

// The same, by tiles: [tile of rows][kBlocks][16][16].
template <int kBlocks>
void store_tiles(const Work& work, const Block* blocks, int64_t first, int64_t rows,
                 const float* sums) {
#if defined(__AVX512BF16__)
  if (kBlocks == 2 && blocks[1].rows == kLanes && work.call.type == kBfloat16) {
    const Floats low = load_bias(work.call, blocks[0]), high = load_bias(work.call, blocks[1]);
    const int64_t outputs = work.outputs;
    uint16_t* const y = (uint16_t*)work.call.y + first * outputs + blocks->first_row;
    for (int64_t r = 0; r < rows; ++r) {
      const float* const from = sums + (r / kTile * 2 * kTile + r % kTile) * kLanes;
      const Floats a = load<Floats>(from) + low, b = load<Floats>(from + kTile * kLanes) + high;
      store(y + r * outputs, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    }
    return;
  }
#endif
  for (int64_t r = 0; r < rows; r += kTile)
    for (int b = 0; b < kBlocks; ++b)
      store_sums(work, blocks[b], first + r, smaller(kTile, rows - r),
                 sums + (r * kBlocks + b * kTile) * kLanes);
}

// Pairs of blocks that a thread computes side by side.
struct Chunk {
  const int64_t size;
  int64_t count = 0;
  Buffer<Pair> pairs;

  explicit Chunk(int64_t size) : size(size), pairs(size) {}
  void find(const Work& work, int64_t at) {
    count = smaller(size, count_pairs(work.plan) - at);
    for (int64_t p = 0; p < count; ++p)
      pairs.data[p] = find_pair(work.plan, work.call.packed, at + p);
  }
  // use<how many>(which of the chunk's pairs, blocks, which of the pair's is the first) for all
  // pairs, whole if kMost is 2.
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

// Pairs of a chunk: so few that there is enough for all threads.
int64_t chunk_size(const Work& work, int64_t most) {
  const int64_t share = count_pairs(work.plan) / (work.alone ? 1 : 4 * omp_get_max_threads());
  return share < 1 ? 1 : smaller(share, most);
}

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

// What the salient weights of a chunk add to its sums, in a pass of its own.
class SalientSums {
 public:
  SalientSums(const Plan& plan, int64_t chunk_pairs, int64_t row_tiles)
      : plan_(plan), row_tiles_(row_tiles), span_(kSalientSpan / plan.group_size + 1),
        sums_(plan.salient_count ? 2 * chunk_pairs * row_tiles * kSize : 0),
        changes_(span_ * plan.salient_count) {}

  // columns(block, tile): inputs of the tile's rows of x, [column][16].
  template <class Columns>
  void find(const Chunk& chunk, int64_t rows, Columns&& columns) {
    if (!plan_.salient_count) return;
    std::memset(sums_.data, 0, size_t(2 * chunk.count * row_tiles_ * kSize) * sizeof(float));
    // A span of inputs serves all blocks before the next.
    for (int64_t g = 0; g < plan_.groups; g += span_)
      chunk.for_each<1>([&]<int>(int64_t p, const Block* block, int b) {
        const int64_t end = smaller(g + span_, plan_.groups);
        find_changes(plan_, *block, g, end, changes_.data);
        for (int64_t t = 0; t * kTile < rows; ++t)
          add_changes(changes_.data, (end - g) * plan_.salient_count, columns(*block, t),
                      at(p, b, t));
      });
  }

  // totals: of blocks of pair p from b on, [tile of rows][kBlocks][16][16].
  template <int kBlocks>
  void add(int64_t p, int b, int64_t rows, float* totals) const {
    if (!plan_.salient_count) return;
    for (int64_t t = 0; t * kTile < rows; ++t)
      for (int c = 0; c < kBlocks; ++c)
        add_turned(at(p, b + c, t), smaller(kTile, rows - t * kTile),
                   totals + (t * kBlocks + c) * kSize);
  }

 private:
  static constexpr int64_t kSize = kTile * kLanes;
  float* at(int64_t p, int b, int64_t tile) const {
    return sums_.data + ((2 * p + b) * row_tiles_ + tile) * kSize;
  }
  const Plan& plan_;
  const int64_t row_tiles_, span_;
  const Buffer<float> sums_;
  const Buffer<Change> changes_;
};

#endif

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
    default: return run_dot<kBits, kDigits, kFewRows>(work);
  }
}

// Tiles of sixteen rows of x in fixed point.
template <int kDigits>
class DigitMemory {
 public:
  DigitMemory(const Plan& plan, int64_t count)
      : tiles_(count * byte_tiles(plan) * kDigits * kByteTile), units_(count * plan.groups * kTile),
        totals_(count * plan.groups * kTile), starts_(count * plan.groups * kTile * kDigits),
        columns_(plan.salient_count ? count * plan.columns * kTile : 0), all_(count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t groups = i * plan.groups * kTile;
      all_.data[i] = {tiles_.data + i * byte_tiles(plan) * kDigits * kByteTile,
                      units_.data + groups, totals_.data + groups, starts_.data + groups * kDigits,
                      columns_.data + i * plan.columns * kTile};
    }
  }
  const Digits& operator[](int64_t i) const { return all_.data[i]; }

 private:
  Buffer<int8_t> tiles_;
  Buffer<float> units_, totals_;
  Buffer<int32_t> starts_;
  Buffer<float> columns_;
  Buffer<Digits> all_;
};

template <int kBits, int kDigits>
void run_digits(const Work& work) {
  constexpr int kMost = kDigits < 3 ? 2 : 1;  // blocks whose sums fit into tiles
  constexpr int64_t kSize = kTile * kLanes;    // sums of a block and a tile of rows
  const Call& call = work.call;
  const Plan& plan = work.plan;
  const int64_t slab = smaller(kDigitSlab, call.rows);
  const int64_t row_tiles = (slab + kTile - 1) / kTile;
  const int64_t pairs = count_pairs(plan), chunk_pairs = chunk_size(work, kChunkPairs);
  DigitMemory<kDigits> x(plan, work.variants * row_tiles);
#pragma omp parallel if (!work.alone)
  {
    const Tiles registers(call.rows);
    Chunk chunk(chunk_pairs);
    Buffer<float> arranged(kTile * plan.group_size), sums(chunk_pairs * 2 * row_tiles * kSize);
    SalientSums salient(plan, chunk_pairs, row_tiles);
    Buffer<uint8_t> levels(2 * byte_tiles(smaller(plan.group_size, plan.columns)) * kByteTile);
    for (int64_t first = 0; first < call.rows; first += slab) {
      const int64_t rows = smaller(slab, call.rows - first);
#pragma omp for
      for (int64_t i = 0; i < work.variants * row_tiles * plan.groups; ++i) {
        const int64_t tile = i / plan.groups, group = i % plan.groups;  // of all variants
        const int64_t top = tile % row_tiles * kTile, there = smaller(kTile, rows - top);
        if (there <= 0) continue;
        work.arrange_tile(first + top, there, tile / row_tiles, group, arranged.data);
        set_digits<kDigits>(plan, arranged.data, group, there, x[tile]);
      }
#pragma omp for
      for (int64_t at = 0; at < pairs; at += chunk_pairs) {
        chunk.find(work, at);
        const auto inputs = [&](const Block& block) { return &x[work.variant(block) * row_tiles]; };
        const auto at_block = [&](int64_t p, int b) { return (2 * p + b) * row_tiles * kSize; };
        chunk.template for_each<kMost>([&]<int kBlocks>(int64_t p, const Block* blocks, int b) {
          digit_blocks<kBits, kDigits, kBlocks>(plan, blocks, inputs(*blocks), rows, levels.data,
                                                sums.data + at_block(p, b));
        });
        salient.find(chunk, rows,
                     [&](const Block& block, int64_t t) { return inputs(block)[t].columns; });
        chunk.template for_each<kMost>([&]<int kBlocks>(int64_t p, const Block* blocks, int b) {
          float* const to = sums.data + at_block(p, b);
          salient.add<kBlocks>(p, b, rows, to);
          store_tiles<kBlocks>(work, blocks, first, rows, to);
        });
      }
    }
  }
}

#endif

#if defined(__AVX512BF16__)

// Rows of x in bfloat16, times column scales, in the tiles of `to_spans`.
class BfloatInputs {
 public:
  BfloatInputs(const Work& work, int64_t span, int64_t slab)
      : work_(work), span_(span), size_(slab * work.plan.columns), x_(work.variants * size_),
        scales_(work.plan.column_scale ? work.variants * work.plan.columns : 0) {
    for (int64_t v = 0; work.plan.column_scale && v < work.variants; ++v)
      arrange_scales(work.plan, work.column_scale(v), scales_.data + v * work.plan.columns);
  }

  // Rows [first, first + rows), by all threads of a team.
  void set(int64_t first, int64_t rows) {
    const Plan& plan = work_.plan;
#pragma omp for
    for (int64_t i = 0; i < work_.variants * rows; ++i) {
      const int64_t variant = i / rows, row = i % rows;
      to_spans(plan, span_, (const uint16_t*)work_.call.x + (first + row) * plan.columns,
               plan.column_scale ? scales_.data + variant * plan.columns : nullptr, row, rows,
               x_.data + variant * size_);
    }
  }
  const uint16_t* of(int64_t variant) const { return x_.data + variant * size_; }

 private:
  const Work& work_;
  const int64_t span_, size_;
  const Buffer<uint16_t> x_;
  const Buffer<float> scales_;
};

template <class Way>
void run_bfloats(const Work& work) {
  const Plan& plan = work.plan;
  const int64_t slab = smaller(kSlabRows, padded_rows(work.call.rows));
  const int64_t pairs = count_pairs(plan);
  const int64_t chunk_pairs = chunk_size(work, Way::kScaled ? kMergePairs : kLevelPairs);
  const int64_t span = Way::span_columns(plan);
  BfloatInputs x(work, span, slab);
#pragma omp parallel if (!work.alone)
  {
    const Tiles registers(work.call.rows);
    Buffer<float> totals(chunk_pairs * 2 * slab * kLanes);
    Buffer<Share> shares(chunk_pairs);
    Buffer<uint16_t> weights(4 * span * kLanes);
    Chunk chunk(chunk_pairs);
    for (int64_t first = 0; first < work.call.rows; first += slab) {
      const int64_t rows = smaller(slab, work.call.rows - first);
      x.set(first, rows);
#pragma omp for
      for (int64_t at = 0; at < pairs; at += chunk_pairs) {
        chunk.find(work, at);
        int64_t count = 0;
        chunk.for_each<2>([&]<int kBlocks>(int64_t p, const Block* blocks, int) {
          shares.data[count++] = {blocks, kBlocks, x.of(work.variant(*blocks)),
                                  totals.data + 2 * p * slab * kLanes};
        });
        multiply_shares<Way>(plan, shares.data, count, rows, weights.data);
        chunk.for_each<2>([&]<int kBlocks>(int64_t p, const Block* blocks, int) {
          store_tiles<kBlocks>(work, blocks, first, rows, totals.data + 2 * p * slab * kLanes);
        });
      }
    }
  }
}

#if !defined(__AMX_BF16__)

template <int kBits>
void run_held(const Work& work) {
  constexpr int64_t kSize = kTile * kLanes;
  const Plan& plan = work.plan;
  const int64_t rows = work.call.rows;
  const int64_t pairs = count_pairs(plan), chunk_pairs = chunk_size(work, kChunkPairs);
  BfloatInputs x(work, smaller(plan.group_size, plan.columns), kTile);
  const Buffer<float> columns(work.variants * plan.columns * kTile);
  const Buffer<float> input_sums(work.variants * plan.groups * kTile);
#pragma omp parallel if (!work.alone)
  {
    const BfloatLevels<kBits> levels(plan);
    Chunk chunk(chunk_pairs);
    Buffer<float> totals(chunk_pairs * 2 * kSize);
    SalientSums salient(plan, chunk_pairs, 1);
    x.set(0, rows);
#pragma omp for
    for (int64_t i = 0; i < work.variants * plan.groups; ++i)
      part_columns(plan, x.of(i / plan.groups), i % plan.groups,
                   columns.data + i / plan.groups * plan.columns * kTile,
                   input_sums.data + i * kTile);
#pragma omp for
    for (int64_t at = 0; at < pairs; at += chunk_pairs) {
      chunk.find(work, at);
      chunk.for_each<1>([&]<int>(int64_t p, const Block* block, int b) {
        const int64_t variant = work.variant(*block);
        const float* const sums = input_sums.data + variant * plan.groups * kTile;
        float* const to = totals.data + (2 * p + b) * kSize;
        if (rows <= 12) held_block<kBits, 12>(plan, *block, x.of(variant), sums, levels, to);
        else held_block<kBits, kTile>(plan, *block, x.of(variant), sums, levels, to);
      });
      salient.find(chunk, rows, [&](const Block& block, int64_t) {
        return columns.data + work.variant(block) * plan.columns * kTile;
      });
      chunk.for_each<2>([&]<int kBlocks>(int64_t p, const Block* blocks, int) {
        float* const to = totals.data + 2 * p * kSize;
        salient.add<kBlocks>(p, 0, rows, to);
        store_tiles<kBlocks>(work, blocks, 0, rows, to);
      });
    }
  }
}

#endif

#endif

template <int kBits>
void choose(const Work& work) {
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
  const bool single = work.call.type == kFloat32;
  if (work.plan.int8_inputs)
    return work.call.rows <= kFewRows ? choose_dot<kBits, 1>(work) : run_digits<kBits, 1>(work);
  if (work.call.rows <= kFewRows)
    return single ? choose_dot<kBits, 3>(work) : choose_dot<kBits, 2>(work);
#if defined(__AVX512BF16__)
  if (work.call.type == kBfloat16 && work.call.rows > kHeldRows<2>) {
    // A group's sums are scaled for each row, its weights once.
    const int64_t rows = work.call.rows, group = work.plan.group_size;
#if !defined(__AMX_BF16__)
    if (rows <= kTile) return run_held<kBits>(work);
#endif
    if (rows > (work.plan.uniform ? smaller(kDigitRows, group / 4)
                                  : smaller(kLevelRows, group * 3 / 4)))
      return run_bfloats<Merge<kBits>>(work);
    if (!work.plan.uniform) return run_bfloats<Levels<kBits>>(work);
  }
#endif
  return single ? run_digits<kBits, 3>(work) : run_digits<kBits, 2>(work);
#else
  return run_plain<kBits>(work);
#endif
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
