// Salient weights by what they change: added from float32 inputs that lie column by column.
#pragma once

#include "amx_tiles.h"

#if defined(__AVX512F__)

namespace precalib {
namespace {

// A salient weight of each row of a block.
struct Change {
  alignas(64) float by[kLanes];    // what it differs by from the base weight in its place
  alignas(64) int32_t at[kLanes];  // where its column of x begins
};

// The salient weights of some groups. A pass of its own: what is read back at once takes longer.
inline void find_changes(const Plan& plan, const Block& block, int64_t first_group,
                         int64_t last_group, Change* changes) {
  for (int64_t g = first_group; g < last_group; ++g) {
    const Group group = find_group(plan, block, g);
    const Floats scale = group_scales(plan, block, group);
    const Floats zero = group_zeros(plan, group);
    for (int64_t j = 0; j < plan.salient_count; ++j, ++changes) {
      const Salient salient = find_salient(plan, block, group, j);
      const Floats base = (salient.level - zero) * scale;
      store(changes->by, (Ints)(salient.value - base) & salient.used);
      store(changes->at, ((salient.position & salient.used) + int32_t(group.first)) * kTile);
    }
  }
}

// columns: of sixteen rows of x; sums: [row of the block][row of x], added to.
inline void add_changes(const Change* changes, int64_t count, const float* columns, float* sums) {
  [&]<int... lane>(std::integer_sequence<int, lane...>) {
    Floats sum[kLanes] = {load<Floats>(sums + lane * kTile)...};
    for (int64_t i = 0; i < count; ++i)
      (add_product(sum[lane], changes[i].by + lane, load<Floats>(columns + changes[i].at[lane])),
       ...);
    (store(sums + lane * kTile, sum[lane]), ...);
  }(std::make_integer_sequence<int, kLanes>{});
}

// totals: [row of x][row of the block] += the above, turned.
inline void add_turned(const float* sums, int64_t rows, float* totals) {
  Floats square[kTile];
  turn(sums, kTile, square);
  for (int64_t r = 0; r < rows; ++r)
    store(totals + r * kLanes, load<Floats>(totals + r * kLanes) + square[r]);
}

}  // namespace
}  // namespace precalib

#endif
