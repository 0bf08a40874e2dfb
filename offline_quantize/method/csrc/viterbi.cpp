// Viterbi search through the trellis of `format/layout.py`, several groups side by side, one per
// lane.
//
// It does the arithmetic of `trellis.search_torch` in the same order, so both give the same codes.
// Loops over the lanes have a fixed length and no branches, so that the compiler vectorizes them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "lanes.h"
#include "nearest_entries.h"

namespace {

// As many groups as there are lanes, weight by weight with the lanes side by side.
struct Block {
  int size;
  std::vector<Floats> scaled;  // weights in units of codebook entries
  std::vector<Floats> importance;
  std::vector<Ints> forced, points, codes;
  std::vector<Floats> values;
  std::vector<Ints> survivors;  // [size][4 states (u[k], u[k-1])]: u[k-2] of the best path there

  explicit Block(int size)
      : size(size),
        scaled(size),
        importance(size, Floats{} + 1.0f),
        forced(size),
        points(size),
        codes(size),
        values(size),
        survivors(size_t(size) * 4) {}

  // weight_importance: of the squared errors, or null for 1.
  void load(const float* weights, const float* unit, const uint8_t* given,
            const float* weight_importance, int lanes) {
    if (weight_importance)
      for (int l = 0; l < lanes; ++l)
        for (int k = 0; k < size; ++k) importance[k][l] = weight_importance[int64_t(l) * size + k];
    for (int l = 0; l < lanes; ++l)
      for (int k = 0; k < size; ++k) {
        const float x = weights[int64_t(l) * size + k] * unit[l];
        scaled[k][l] = x == x ? x : 0.0f;  // NaN would index out of the tables
        forced[k][l] = given[int64_t(l) * size + k];
      }
  }

  // Fills `survivors`. cost: of the best path to each state after the last weight, [state].
  void search(const NearestEntries& entries, Floats* cost) {
    for (int s = 0; s < 4; ++s) cost[s] = Floats{} + (s ? INFINITY : 0.0f);
    for (int k = 0; k < size; ++k) {
      const Floats x = scaled[k];
      const Ints f = forced[k];
      points[k] = entries.point(x);
      Floats error[4];  // branch metric of each subset
      for (int s = 0; s < 4; ++s) {
        const Floats distance = x - entries.at(s, points[k]).value;
        error[s] = f > 1 ? distance * distance * importance[k] : Floats{};
      }
      // by u[k]: infinite where the low bit is given and is the other one
      const Floats constraint[2] = {f == 1 ? Floats{} + INFINITY : Floats{},
                                    f == 0 ? Floats{} + INFINITY : Floats{}};
      Floats next[4];
      for (int u = 0; u < 2; ++u)      // u[k]
        for (int a = 0; a < 2; ++a) {  // u[k-1]; then u[k-2] is 0 or 1
          const Floats from_0 = cost[2 * a] + error[2 * u + a];
          const Floats from_1 = cost[2 * a + 1] + error[2 * (u ^ 1) + a];
          const Ints survivor = from_1 < from_0;
          survivors[size_t(k) * 4 + 2 * u + a] = survivor & 1;
          next[2 * u + a] = (survivor ? from_1 : from_0) + constraint[u];
        }
      for (int s = 0; s < 4; ++s) cost[s] = next[s];
    }
  }

  // Codes and values along the best paths, from the last weight back to the first.
  void trace(const NearestEntries& entries, const Floats* cost) {
    Ints state = {};
    Floats least = cost[0];
    for (int s = 1; s < 4; ++s) {
      const Ints better = cost[s] < least;
      state = better ? Ints{} + s : state;
      least = better ? cost[s] : least;
    }
    for (int k = size - 1; k >= 0; --k) {
      const Ints* const survivor = &survivors[size_t(k) * 4];
      const Ints now = state >> 1, last = state & 1;
      const Ints before = state == 0   ? survivor[0]
                          : state == 1 ? survivor[1]
                          : state == 2 ? survivor[2]
                                       : survivor[3];
      const Entry entry = entries.at(2 * (now ^ before) + last, points[k]);
      codes[k] = 2 * entry.rank + now;
      values[k] = entry.value;
      state = 2 * last + before;
    }
  }

  void store(uint8_t* out_codes, float* out_values, int lanes) const {
    for (int l = 0; l < lanes; ++l)
      for (int k = 0; k < size; ++k) {
        out_codes[int64_t(l) * size + k] = uint8_t(codes[k][l]);
        out_values[int64_t(l) * size + k] = values[k][l];
      }
  }
};

void search_all(const float* weights, const float* unit, const uint8_t* forced,
                const float* importance, const NearestEntries& entries, int64_t groups,
                int32_t size, uint8_t* codes, float* values) {
  Block block(size);
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, groups - first));
    const int64_t offset = first * size;
    Floats cost[4];
    block.load(weights + offset, unit + first, forced + offset,
               importance ? importance + offset : nullptr, lanes);
    block.search(entries, cost);
    block.trace(entries, cost);
    block.store(codes + offset, values + offset, lanes);
  }
}

}  // namespace

// weights: [groups][size];  unit: [groups], codebook units per weight unit;  forced:
// [groups][size], the low bit of the code where it is given, else 2;  importance: [groups][size],
// factors of the squared errors, or null for 1;  results: codes and codebook entries,
// [groups][size].  Returns 0, or 1 if the memory is not enough.
extern "C" int32_t trellis_search(const float* weights, const float* unit, const uint8_t* forced,
                                  const float* importance, const int32_t* codebook,
                                  int32_t codebook_size, int32_t limit, int64_t groups,
                                  int32_t size, uint8_t* codes, float* values) {
  try {
    const NearestEntries entries(codebook, codebook_size, limit, 4);
    search_all(weights, unit, forced, importance, entries, groups, size, codes, values);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
