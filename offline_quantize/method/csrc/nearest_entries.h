// The codebook entries nearest to each number.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "lanes.h"

// For each subset of the codebook, the entry nearest to each integer: its rank in the subset, and
// its value. Without a trellis there is one subset.
struct NearestEntries {
  int width;
  std::vector<int32_t> rank;  // [subsets][width]
  std::vector<float> value;

  NearestEntries(const int32_t* codebook, int count, int limit, int subsets)
      : width(2 * limit + 1) {
    for (int s = 0; codebook && s < subsets; ++s)
      for (int point = -limit; point <= limit; ++point) {
        int best = 0;
        for (int j = 1; subsets * j + s < count; ++j)
          if (std::abs(point - codebook[subsets * j + s]) <
              std::abs(point - codebook[subsets * best + s]))
            best = j;
        rank.push_back(best);
        value.push_back(float(codebook[subsets * best + s]));
      }
  }
};
