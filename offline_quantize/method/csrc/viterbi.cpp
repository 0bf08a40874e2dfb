// Viterbi search through the trellis of `format/layout.py`, several groups side by side, one per
// lane.
//
// It does the arithmetic of `trellis.search_torch` in the same order, so both give the same codes.
// Loops over the lanes have a fixed length and no branches, so that the compiler vectorizes them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kStates = 4;   // (u[k], u[k-1])
constexpr int kSubsets = 4;  // of the codebook

// What a code stands for: its rank in its subset of the codebook, and its value.
struct Entry {
  Ints rank;
  Floats value;
};

// The entries of each subset that are nearest to the integers from -limit to limit. The search
// needs those of all four subsets at each weight, so a word holds their values and one look-up
// finds them; nearest_entries.h, for error feedback, finds one entry at a time.
class SubsetEntries {
 public:
  SubsetEntries(const int32_t* codebook, int count, int limit)
      : limit_(limit), words_(2 * limit + 1), entries_(kSubsets * words_.size()) {
    for (int s = 0; s < kSubsets; ++s)
      for (int i = 0; i <= 2 * limit; ++i) {
        const auto distance = [&](int j) {
          return std::abs(i - limit - codebook[kSubsets * j + s]);
        };
        int best = 0;
        for (int j = 1; kSubsets * j + s < count; ++j)
          if (distance(j) < distance(best)) best = j;
        const uint32_t value = uint8_t(codebook[kSubsets * best + s]);
        words_[i] = int32_t(uint32_t(words_[i]) | value << 8 * s);
        entries_[s * words_.size() + i] = int32_t(value << 24 | uint32_t(best));
      }
  }

  // Index of the integer nearest to x, the even one of two, in codebook units. 1.5 * 2^23 has its
  // last place at one, so adding it rounds.
  Ints point(Floats x) const {
    const Floats rounded = clamp(x, float(-limit_), float(limit_)) + 12582912.0f;
    return Ints(rounded) - (0x4b400000 - limit_);
  }

  // The values of all four entries, a byte for each, by subset.
  Ints values(Ints point) const { return look_up(words_.data(), point); }

  Entry at(Ints subset, Ints point) const {
    const Ints found = look_up(entries_.data(), subset * (2 * limit_ + 1) + point);
    return {found & 0xffff, to_floats(found >> 24)};
  }

 private:
  int limit_;
  std::vector<int32_t> words_;    // [points]
  std::vector<int32_t> entries_;  // [subsets][points]: value in the highest byte, and rank
};

// As many groups as there are lanes, weight by weight with the lanes side by side.
class Block {
 public:
  explicit Block(int size)
      : size_(size),
        weights_(size),
        importance_(size, splat(1.0f)),
        forced_(size),
        any_forced_(size),
        survivors_(size),
        points_(size),
        best_survivors_(size),
        best_points_(size),
        codes_(size),
        values_(size) {}

  // importance: of the squared errors, or null for 1.
  void load(const float* weights, const uint8_t* forced, const float* importance, int lanes) {
    for (int l = 0; l < lanes; ++l)
      for (int k = 0; k < size_; ++k) {
        const int64_t at = int64_t(l) * size_ + k;
        weights_[k][l] = weights[at];
        forced_[k][l] = forced[at];
        if (importance) importance_[k][l] = importance[at];
      }
    for (int k = 0; k < size_; ++k) any_forced_[k] = any(forced_[k] < 2);
  }

  // Searches with one of several scales and keeps the best paths so far.
  // unit: codebook units per weight unit;  step: its reciprocal.
  void search(const SubsetEntries& entries, int candidate, Floats unit, Floats step) {
    Floats cost[kStates];  // of the best path to each state
    for (int s = 0; s < kStates; ++s) cost[s] = splat(s ? INFINITY : 0.0f);
    for (int k = 0; k < size_; ++k) advance(entries, k, or_zero(weights_[k] * unit), cost);
    Ints state = {};
    Floats least = cost[0];
    for (int s = 1; s < kStates; ++s) {
      const Ints better = cost[s] < least;
      state = better ? Ints{} + s : state;
      least = better ? cost[s] : least;
    }
    const Floats loss = least * step * step;
    const Ints better = candidate ? loss < loss_ : ~Ints{};
    loss_ = better ? loss : loss_;
    chosen_ = better ? Ints{} + candidate : chosen_;
    state_ = better ? state : state_;
    if (!candidate) {
      std::swap(survivors_, best_survivors_);
      std::swap(points_, best_points_);
      return;
    }
    for (int k = 0; k < size_; ++k) {
      best_survivors_[k] = better ? survivors_[k] : best_survivors_[k];
      best_points_[k] = better ? points_[k] : best_points_[k];
    }
  }

  // Codes and values along the best paths, from the last weight back to the first.
  void trace(const SubsetEntries& entries) {
    Ints state = state_;
    for (int k = size_ - 1; k >= 0; --k) {
      const Ints now = state >> 1, last = state & 1;
      const Ints before = (best_survivors_[k] >> state) & 1;
      const Entry entry = entries.at(2 * (now ^ before) + last, best_points_[k]);
      codes_[k] = 2 * entry.rank + now;
      values_[k] = entry.value;
      state = 2 * last + before;
    }
  }

  void store(uint8_t* codes, float* values, uint8_t* chosen, int lanes) const {
    for (int l = 0; l < lanes; ++l) {
      chosen[l] = uint8_t(chosen_[l]);
      for (int k = 0; k < size_; ++k) {
        codes[int64_t(l) * size_ + k] = uint8_t(codes_[k][l]);
        values[int64_t(l) * size_ + k] = values_[k][l];
      }
    }
  }

 private:
  int size_;
  std::vector<Floats> weights_, importance_;
  std::vector<Ints> forced_;  // the low bit of the code where it is given, else 2
  std::vector<uint8_t> any_forced_;
  std::vector<Ints> survivors_;  // u[k-2] of the best path to each state, a bit per state
  std::vector<Ints> points_;
  Floats loss_ = {};  // of the best scale so far, as all that follows
  Ints chosen_ = {}, state_ = {};
  std::vector<Ints> best_survivors_, best_points_;
  std::vector<Ints> codes_;
  std::vector<Floats> values_;

  void advance(const SubsetEntries& entries, int k, Floats x, Floats* cost) {
    points_[k] = entries.point(x);
    const Ints words = entries.values(points_[k]);
    Floats error[kSubsets];  // branch metrics
    for (int s = 0; s < kSubsets; ++s) {
      const Floats distance = x - to_floats(words << (24 - 8 * s) >> 24);
      error[s] = distance * distance * importance_[k];
    }
    if (any_forced_[k])
      for (int s = 0; s < kSubsets; ++s) error[s] = forced_[k] > 1 ? error[s] : Floats{};
    Floats next[kStates];
    Ints survivors = {};
    for (int u = 0; u < 2; ++u)      // u[k]
      for (int a = 0; a < 2; ++a) {  // u[k-1]; then u[k-2] is 0 or 1
        const int s = 2 * u + a;
        const Floats from_0 = cost[2 * a] + error[s];
        const Floats from_1 = cost[2 * a + 1] + error[s ^ 2];
        const Ints survivor = from_1 < from_0;
        survivors |= survivor & (1 << s);
        next[s] = survivor ? from_1 : from_0;
      }
    if (any_forced_[k])  // infinite where the low bit is given and is the other one
      for (int s = 0; s < kStates; ++s)
        next[s] += forced_[k] == 1 - s / 2 ? splat(INFINITY) : Floats{};
    survivors_[k] = survivors;
    for (int s = 0; s < kStates; ++s) cost[s] = next[s];
  }
};

}  // namespace

// weights: [groups][size];  unit: [candidates][groups], codebook units per weight unit;  step: its
// reciprocal;  forced: [groups][size], the low bit of the code where it is given, else 2;
// importance: [groups][size], factors of the squared errors, or null for 1;  results: codes and
// codebook entries, [groups][size], and which unit they are for, [groups].  Returns 0, or 1 if the
// memory is not enough.
extern "C" int32_t trellis_search(const float* weights, const float* unit, const float* step,
                                  int32_t candidates, const uint8_t* forced,
                                  const float* importance, const int32_t* codebook,
                                  int32_t codebook_size, int32_t limit, int64_t groups,
                                  int32_t size, uint8_t* codes, float* values, uint8_t* chosen) {
  try {
    const SubsetEntries entries(codebook, codebook_size, limit);
    Block block(size);
    for (int64_t first = 0; first < groups; first += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, groups - first));
      const int64_t offset = first * size;
      block.load(weights + offset, forced + offset, importance ? importance + offset : nullptr,
                 lanes);
      for (int c = 0; c < candidates; ++c) {
        Floats units = {}, steps = {};
        for (int l = 0; l < lanes; ++l) {
          units[l] = unit[c * groups + first + l];
          steps[l] = step[c * groups + first + l];
        }
        block.search(entries, c, units, steps);
      }
      block.trace(entries);
      block.store(codes + offset, values + offset, chosen + first, lanes);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
