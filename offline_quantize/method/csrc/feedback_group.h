// Codes of one group of a few rows with error feedback; see feedback.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "feedback_rows.h"
#include "feedback_task.h"
#include "lanes.h"
#include "nearest_entries.h"

constexpr int kBlock = 16;  // columns whose errors are summed up before they move a target
constexpr int kList = 1;    // paths to each state that are kept

// A code for one column, and what it stands for.
struct Choice {
  Ints code;
  Floats value;
};

// kStates: 4 with a trellis, else 1.
template <int kStates>
class Group {
 public:
  static constexpr int kPaths = kStates > 1 ? kStates * kList : 1;  // p leads to state p / kList

  const FeedbackTask& task;
  int size = 0, start = 0;    // columns of this group; the first one
  std::vector<Ints> code;     // [size], of the best path
  std::vector<Floats> value;  // [size]
  std::vector<Floats> error;  // [size]
  Ints chosen;

  Group(const FeedbackTask& task, const NearestEntries& entries)
      : task(task),
        code(task.group_size),
        value(task.group_size),
        error(task.group_size),
        entries_(entries),
        effects_(size_t(task.group_size) * task.group_size),
        salient_(task.group_size),
        any_salient_(task.group_size),
        moved_(task.group_size),
        history_(size_t(task.group_size) * kPaths),
        origin_(size_t(task.group_size / kBlock + 1) * kPaths),
        codes_(size_t(task.group_size) * kPaths),
        values_(size_t(task.group_size) * kPaths) {}

  // What all rows share.
  void begin(int group) {
    group_ = group;
    start = group * task.group_size;
    size = int(std::min<int64_t>(task.group_size, task.columns - start));
    for (int j = 0; j < size; ++j)
      for (int k = j + 1; k < size; ++k)
        effects_[size_t(k) * size + j] = task.effects[(start + j) * task.columns + start + k];
  }

  // Codes, values and errors of the group; `rows.target` holds the target of each column.
  void encode(const Rows& rows, int64_t first, int lanes) {
    load_salient(first, lanes);
    Floats least = {};
    chosen = Ints{};
    for (int c = 0; c < task.candidates; ++c) {
      load_scales(c, first, lanes);
      const Floats loss = search(rows) * step_ * step_;
      const Ints better = c ? loss < least : ~Ints{};
      least = better ? loss : least;
      chosen = better ? Ints{} + c : chosen;
      for (int k = 0; k < size; ++k) {
        code[k] = better ? codes_[size_t(k) * kPaths] : code[k];
        value[k] = better ? values_[size_t(k) * kPaths] : value[k];
      }
    }
    for (int k = 0; k < size; ++k) error[k] = rows.weight[start + k] - value[k];
  }

 private:
  const NearestEntries& entries_;
  int group_ = 0;
  Floats unit_, step_, zero_;
  std::vector<float> effects_;  // [size][size], row k: how earlier errors move target k
  std::vector<Ints> salient_;   // [size], all bits set where salient
  std::vector<uint8_t> any_salient_;
  std::vector<Floats> moved_;  // [size], targets, moved by what all paths have in common
  std::vector<Floats>
      history_;                 // [size][kPaths], errors of each path; in a finished block those of
                                // the paths at its end
  std::vector<Ints> origin_;    // [blocks][kPaths], the path at the end of a finished block that
                                // each path continues
  std::vector<Ints> codes_;     // [size][kPaths]: code, and 256 * which way the path came
  std::vector<Floats> values_;  // [size][kPaths]

  void load_salient(int64_t first, int lanes) {
    const int64_t stride = int64_t(task.groups) * task.group_size;
    std::fill(salient_.begin(), salient_.end(), Ints{});
    for (int l = 0; l < lanes; ++l) {
      const uint8_t* const mask = task.salient + (first + l) * stride + start;
      for (int k = 0; k < size; ++k) salient_[k][l] = -int32_t(mask[k]);
    }
    for (int k = 0; k < size; ++k) any_salient_[k] = any(salient_[k]);
  }

  void load_scales(int candidate, int64_t first, int lanes) {
    unit_ = step_ = zero_ = Floats{};
    for (int l = 0; l < lanes; ++l) {
      const int64_t at = (candidate * task.rows + first + l) * task.groups + group_;
      unit_[l] = task.unit[at];
      step_[l] = task.step[at];
      if (task.zero) zero_[l] = task.zero[at];
    }
  }

  // Leaves codes and values of the best path at the places of path 0; the loss in codebook units.
  Floats search(const Rows& rows) {
    std::copy_n(rows.target.begin() + start, size, moved_.begin());
    Floats cost[kPaths], common = {};
    for (int p = 0; p < kPaths; ++p) cost[p] = splat(p ? INFINITY : 0.0f);
    int merged = 0;
    for (int k = 0; k < size; ++k) {
      if (k && k % kBlock == 0) {
        const int b = k / kBlock - 1;
        for (int p = 0; p < kPaths; ++p) origin_[size_t(b) * kPaths + p] = Ints{} + p;
        merged = merge(merged, b + 1);
      }
      Floats target[kPaths];
      for (int p = 0; p < kPaths; ++p) target[p] = moved_[k];
      add_errors(k, merged, target);
      const Floats weight = rows.weight[start + k];
      if constexpr (kStates > 1) advance(rows, k, merged, target, weight, cost, common);
      else choose(rows, k, target[0], weight, cost[0]);
    }
    const Floats least = kStates > 1 ? trace(cost) : cost[0];
    return least + common;
  }

  // Adds to each path's target the errors of the unfinished block and of the finished ones from
  // `merged` on. Earlier blocks have moved the target already.
  void add_errors(int k, int merged, Floats* target) const {
    const float* const effect = effects_.data() + size_t(k) * size;
    const int block = k / kBlock;
    for (int b = merged; b <= block; ++b) {
      Floats sum[kPaths] = {};
      const int end = std::min(k, (b + 1) * kBlock);
      for (int j = b * kBlock; j < end; ++j)
        for (int p = 0; p < kPaths; ++p) sum[p] += history_[size_t(j) * kPaths + p] * effect[j];
      for (int p = 0; p < kPaths; ++p)
        target[p] += b < block ? pick<kPaths>(sum, origin_[size_t(b) * kPaths + p]) : sum[p];
    }
  }

  template <int kCount, typename T>
  static T pick(const T* of, Ints index) {
    T found = of[0];
    for (int i = 1; i < kCount; ++i) found = index == i ? of[i] : found;
    return found;
  }

  // Finished blocks whose errors are the same on all paths move the targets of the group at once.
  int merge(int merged, int finished) {
    for (; merged < finished; ++merged) {
      const Ints* const of = &origin_[size_t(merged) * kPaths];
      Ints differs = {};
      for (int p = 1; p < kPaths; ++p) differs |= of[p] != of[0];
      if (any(differs)) break;
      Floats known[kBlock];
      for (int j = 0; j < kBlock; ++j)
        known[j] = pick<kPaths>(&history_[size_t(merged * kBlock + j) * kPaths], of[0]);
      for (int k = finished * kBlock; k < size; ++k) {
        const float* const effect = effects_.data() + size_t(k) * size + merged * kBlock;
        Floats sum = {};
        for (int j = 0; j < kBlock; ++j) sum += known[j] * effect[j];
        moved_[k] += sum;
      }
    }
    return merged;
  }

  Floats scaled(Floats target) const { return or_zero(target * unit_); }

  // Squared error at column k, in codebook units.
  Floats metric(int k, Floats distance) const {
    return distance * distance * task.importance[start + k];
  }

  Choice salient_choice(const Rows& rows, Floats target) const {
    const Floats size = task.salient_sign ? (target < 0.0f ? -target : target) : target;
    Floats m = round_to_even((size - rows.salient_offset) * rows.salient_inverse);
    m = clamp(or_zero(m), float(task.salient_low), float(task.salient_high));
    const Floats value = rows.salient_offset + rows.salient_scale * m;
    const Ints code = to_ints(m) + task.salient_bias;
    if (!task.salient_sign) return {code, value};
    const Ints negative = target < 0.0f;
    return {code + (negative & task.salient_sign), negative ? -value : value};
  }

  // Without a trellis: the nearest code.
  void choose(const Rows& rows, int k, Floats target, Floats weight, Floats& cost) {
    const Floats x = scaled(target);
    Choice found;
    if (task.zero) {
      const Floats rounded = clamp(round_to_even(zero_ + x), 0.0f, float(task.limit));
      found = {to_ints(rounded), rounded - zero_};
    } else {
      const Entry entry = entries_.at(0, entries_.point(x));
      found = {entry.rank, entry.value};
    }
    Floats distance = x - found.value;
    found.value *= step_;
    if (any_salient_[k]) {
      const Choice wide = salient_choice(rows, target);
      distance = salient_[k] ? (target - wide.value) * unit_ : distance;
      found.code = salient_[k] ? wide.code : found.code;
      found.value = salient_[k] ? wide.value : found.value;
    }
    cost += metric(k, distance);
    codes_[k] = found.code;
    values_[k] = found.value;
    history_[k] = weight - found.value;
  }

  // One step of the Viterbi search. A state is 2 * u[k] + u[k-1].
  // common: collects what salient weights cost on all paths; it would only round costs off.
  void advance(const Rows& rows, int k, int merged, const Floats* target, Floats weight,
               Floats* cost, Floats& common) {
    Floats metrics[2][kPaths];  // [u[k]][path before]
    Choice choice[2][kPaths];
    for (int p = 0; p < kPaths; ++p) {
      const int last = p / kList >> 1, before = p / kList & 1;
      const Floats x = scaled(target[p]);
      const Ints point = entries_.point(x);
      for (int u = 0; u < 2; ++u) {
        const Entry entry = entries_.at(2 * (u ^ before) + last, point);
        metrics[u][p] = metric(k, x - entry.value);
        choice[u][p] = {2 * entry.rank + u, entry.value * step_};
      }
    }
    if (any_salient_[k]) {
      Choice wide[kPaths];
      Floats extra[kPaths];
      for (int p = 0; p < kPaths; ++p) {
        wide[p] = salient_choice(rows, target[p]);
        extra[p] = metric(k, (target[p] - wide[p].value) * unit_);
      }
      Floats least = extra[0];
      for (int p = 1; p < kPaths; ++p) least = extra[p] < least ? extra[p] : least;
      common += salient_[k] ? least : Floats{};
      for (int p = 0; p < kPaths; ++p)
        for (int u = 0; u < 2; ++u) {
          const Floats fits = (wide[p].code & 1) == u ? or_zero(extra[p] - least) : splat(INFINITY);
          metrics[u][p] = salient_[k] ? fits : metrics[u][p];
          choice[u][p].code = salient_[k] ? wide[p].code : choice[u][p].code;
          choice[u][p].value = salient_[k] ? wide[p].value : choice[u][p].value;
        }
    }
    Floats next[kPaths];
    Ints came[kPaths];  // which of the ways to its state each path took
    for (int s = 0; s < 4; ++s) {
      const int u = s >> 1, before = ways(s);
      Floats* const best = next + s * kList;
      Ints* const way = came + s * kList;
      for (int i = 0; i < kList; ++i) best[i] = splat(INFINITY), way[i] = Ints{};
      for (int w = 0; w < 2 * kList; ++w) {  // insert it, behind those that are as good
        Floats x = cost[before + w] + metrics[u][before + w];
        Ints id = Ints{} + w;
        for (int i = 0; i < kList; ++i) {
          const Ints better = x < best[i];
          const Floats worse = better ? best[i] : x;
          const Ints worse_id = better ? way[i] : id;
          best[i] = better ? x : best[i];
          way[i] = better ? id : way[i];
          x = worse;
          id = worse_id;
        }
      }
      for (int i = 0; i < kList; ++i) {
        Choice taken = choice[u][before];
        for (int w = 1; w < 2 * kList; ++w) {
          taken.code = way[i] == w ? choice[u][before + w].code : taken.code;
          taken.value = way[i] == w ? choice[u][before + w].value : taken.value;
        }
        const size_t at = size_t(k) * kPaths + s * kList + i;
        codes_[at] = taken.code + 256 * way[i];
        values_[at] = taken.value;
        history_[at] = weight - taken.value;
      }
    }
    std::copy_n(next, kPaths, cost);
    for (int j = k / kBlock * kBlock; j < k; ++j) inherit(&history_[size_t(j) * kPaths], came);
    for (int b = merged; b < k / kBlock; ++b) inherit(&origin_[size_t(b) * kPaths], came);
  }

  // The first of the 2 * kList paths that lead to state s next.
  static int ways(int s) { return 2 * (s & 1) * kList; }

  // To each path, what the path had that it continues.
  template <typename T>
  static void inherit(T* paths, const Ints* came) {
    T was[kPaths];
    std::copy_n(paths, kPaths, was);
    for (int p = 0; p < kPaths; ++p) paths[p] = pick<2 * kList>(was + ways(p / kList), came[p]);
  }

  // Codes and values along the best path, from the last column back to the first, and its cost.
  Floats trace(const Floats* cost) {
    Ints path = {};
    Floats least = cost[0];
    for (int p = 1; p < kPaths; ++p) {
      const Ints better = cost[p] < least;
      path = better ? Ints{} + p : path;
      least = better ? cost[p] : least;
    }
    for (int k = size - 1; k >= 0; --k) {
      const size_t at = size_t(k) * kPaths;
      const Ints c = pick<kPaths>(&codes_[at], path);
      values_[at] = pick<kPaths>(&values_[at], path);
      codes_[at] = c & 255;
      path = 2 * kList * (path / kList & 1) + (c >> 8);
    }
    return least;
  }
};
