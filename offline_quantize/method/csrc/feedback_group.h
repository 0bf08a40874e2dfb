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

// A code for one column, and what it stands for.
struct Choice {
  Ints code;
  Floats value;
};

// kStates: 4 with a trellis, else 1. Each state keeps the best path to it.
template <int kStates>
class Group {
 public:
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
        history_(size_t(task.group_size) * kStates),
        origin_(size_t(task.group_size / kBlock + 1) * kStates),
        codes_(size_t(task.group_size) * kStates),
        values_(size_t(task.group_size) * kStates) {}

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
        code[k] = better ? codes_[size_t(k) * kStates] : code[k];
        value[k] = better ? values_[size_t(k) * kStates] : value[k];
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
      history_;                 // [size][kStates], errors of each path; in a finished block those of
                                // the paths at its end
  std::vector<Ints> origin_;    // [blocks][kStates], the path at the end of a finished block that
                                // each path continues
  std::vector<Ints> codes_;     // [size][kStates]: code, and 256 * which way the path came
  std::vector<Floats> values_;  // [size][kStates]

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
    Floats cost[kStates], common = {};
    for (int p = 0; p < kStates; ++p) cost[p] = splat(p ? INFINITY : 0.0f);
    int merged = 0;
    for (int k = 0; k < size; ++k) {
      if (k && k % kBlock == 0) {
        const int b = k / kBlock - 1;
        for (int p = 0; p < kStates; ++p) origin_[size_t(b) * kStates + p] = Ints{} + p;
        merged = merge(merged, b + 1);
      }
      Floats target[kStates];
      for (int p = 0; p < kStates; ++p) target[p] = moved_[k];
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
      Floats sum[kStates] = {};
      const int end = std::min(k, (b + 1) * kBlock);
      for (int j = b * kBlock; j < end; ++j)
        for (int p = 0; p < kStates; ++p) sum[p] += history_[size_t(j) * kStates + p] * effect[j];
      for (int p = 0; p < kStates; ++p)
        target[p] += b < block ? pick(sum, origin_[size_t(b) * kStates + p]) : sum[p];
    }
  }

  template <typename T>
  static T pick(const T* of, Ints index) {
    T found = of[0];
    for (int i = 1; i < kStates; ++i) found = index == i ? of[i] : found;
    return found;
  }

  // Finished blocks whose errors are the same on all paths move the targets of the group at once.
  int merge(int merged, int finished) {
    for (; merged < finished; ++merged) {
      const Ints* const of = &origin_[size_t(merged) * kStates];
      Ints differs = {};
      for (int p = 1; p < kStates; ++p) differs |= of[p] != of[0];
      if (any(differs)) break;
      Floats known[kBlock];
      for (int j = 0; j < kBlock; ++j)
        known[j] = pick(&history_[size_t(merged * kBlock + j) * kStates], of[0]);
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
    Floats metrics[2][kStates];  // [u[k]][path before]
    Choice choice[2][kStates];
    for (int p = 0; p < kStates; ++p) {
      const int last = p >> 1, before = p & 1;
      const Floats x = scaled(target[p]);
      const Ints point = entries_.point(x);
      for (int u = 0; u < 2; ++u) {
        const Entry entry = entries_.at(2 * (u ^ before) + last, point);
        metrics[u][p] = metric(k, x - entry.value);
        choice[u][p] = {2 * entry.rank + u, entry.value * step_};
      }
    }
    if (any_salient_[k]) {
      Choice wide[kStates];
      Floats extra[kStates];
      for (int p = 0; p < kStates; ++p) {
        wide[p] = salient_choice(rows, target[p]);
        extra[p] = metric(k, (target[p] - wide[p].value) * unit_);
      }
      Floats least = extra[0];
      for (int p = 1; p < kStates; ++p) least = extra[p] < least ? extra[p] : least;
      common += salient_[k] ? least : Floats{};
      for (int p = 0; p < kStates; ++p)
        for (int u = 0; u < 2; ++u) {
          const Floats fits = (wide[p].code & 1) == u ? or_zero(extra[p] - least) : splat(INFINITY);
          metrics[u][p] = salient_[k] ? fits : metrics[u][p];
          choice[u][p].code = salient_[k] ? wide[p].code : choice[u][p].code;
          choice[u][p].value = salient_[k] ? wide[p].value : choice[u][p].value;
        }
    }
    Floats next[kStates];
    Ints came[kStates];  // all bits set where the second of the two ways to a state was taken
    for (int s = 0; s < 4; ++s) {
      const int u = s >> 1, before = way(s);
      const Floats first = cost[before] + metrics[u][before];
      const Floats second = cost[before + 1] + metrics[u][before + 1];
      came[s] = second < first;
      next[s] = came[s] ? second : first;
      const Choice *const one = &choice[u][before], *const other = one + 1;
      const size_t at = size_t(k) * kStates + s;
      codes_[at] = (came[s] ? other->code : one->code) + (256 & came[s]);
      values_[at] = came[s] ? other->value : one->value;
      history_[at] = weight - values_[at];
    }
    std::copy_n(next, kStates, cost);
    for (int j = k / kBlock * kBlock; j < k; ++j) inherit(&history_[size_t(j) * kStates], came);
    for (int b = merged; b < k / kBlock; ++b) inherit(&origin_[size_t(b) * kStates], came);
  }

  // The first of the two states before state s.
  static int way(int s) { return 2 * (s & 1); }

  // To each path, what the path had that it continues.
  template <typename T>
  static void inherit(T* paths, const Ints* came) {
    T was[kStates];
    std::copy_n(paths, kStates, was);
    for (int p = 0; p < kStates; ++p) paths[p] = came[p] ? was[way(p) + 1] : was[way(p)];
  }

  // Codes and values along the best path, from the last column back to the first, and its cost.
  Floats trace(const Floats* cost) {
    Ints path = {};
    Floats least = cost[0];
    for (int p = 1; p < kStates; ++p) {
      const Ints better = cost[p] < least;
      path = better ? Ints{} + p : path;
      least = better ? cost[p] : least;
    }
    for (int k = size - 1; k >= 0; --k) {
      const size_t at = size_t(k) * kStates;
      const Ints c = pick(&codes_[at], path);
      values_[at] = pick(&values_[at], path);
      codes_[at] = c & 255;
      path = 2 * (path & 1) + (c >> 8);
    }
    return least;
  }
};
