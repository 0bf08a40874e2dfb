// The codebook entries nearest to each number.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "lanes.h"

// An entry of a subset of the codebook: its rank in the subset, and its value.
struct Entry {
  Ints rank;
  Floats value;
};

// For each subset of the codebook, the entry nearest to each integer from -limit to limit. With a
// trellis there are four subsets, else one. Both parts of an entry are looked up at once.
class NearestEntries {
 public:
  NearestEntries(const int32_t* codebook, int count, int limit, int subsets)
      : end_(float(limit)), width_(2 * limit + 1) {
    for (int s = 0; codebook && s < subsets; ++s)
      for (int point = -limit; point <= limit; ++point) {
        int best = 0;
        for (int j = 1; subsets * j + s < count; ++j)
          if (std::abs(point - codebook[subsets * j + s]) <
              std::abs(point - codebook[subsets * best + s]))
            best = j;
        entries_.push_back(best * 65536 + (codebook[subsets * best + s] + 32768));
      }
  }

  // Index of the integer nearest to x, in codebook units.
  Ints point(Floats x) const { return to_ints(clamp(round_to_even(x), -end_, end_) + end_); }

  Entry at(Ints subset, Ints point) const { return find(entries_.data(), subset * width_ + point); }

  Entry at(int subset, Ints point) const { return find(&entries_[subset * width_], point); }

 private:
  float end_;
  int width_;
  std::vector<int32_t> entries_;  // [subsets][width]: rank, and value + 32768 in the low half

  static Entry find(const int32_t* entries, Ints index) {
    const Ints found = look_up(entries, index);
    return {found >> 16, to_floats((found & 65535) - 32768)};
  }
};
