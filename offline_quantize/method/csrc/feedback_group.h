// One group of sixteen rows with error feedback; see feedback.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "feedback_task.h"
#include "lanes.h"
#include "nearest_entries.h"

constexpr int kBlock = 16;  // columns whose errors are summed up before they move a target
#ifdef __AVX512F__
constexpr int kTile = 16;  // columns whose sums are in registers at once
#else
constexpr int kTile = 4;
#endif

// Sixteen rows.
struct Rows {
  std::vector<Floats> weight, target;  // [columns]
  Floats salient_inverse, salient_scale, salient_offset;

  void load(const FeedbackTask& task, int64_t first, int lanes) {
    const int64_t stride = int64_t(task.groups) * task.group_size;
    weight.assign(task.columns, Floats{});
    salient_inverse = salient_scale = salient_offset = Floats{};
    for (int l = 0; l < lanes; ++l) {
      const float* const row = task.weights + (first + l) * stride;
      for (int64_t k = 0; k < task.columns; ++k) weight[k][l] = row[k];
      if (!task.salient_scale) continue;
      salient_inverse[l] = task.salient_inverse[first + l];
      salient_scale[l] = task.salient_scale[first + l];
      salient_offset[l] = task.salient_offset[first + l];
    }
    target = weight;
  }
};

// A code for one column, and what it stands for.
struct Choice {
  Ints code;
  Floats value;
};

// One group of sixteen rows. kStates is 4 with a trellis, else 1.
template <int kStates>
struct Group {
  const FeedbackTask& task;
  const NearestEntries& tables;
  int size = 0, start = 0;  // columns of this group; the first one
  Floats unit, step, zero;
  std::vector<float> effects;  // [size][size], row k: how earlier errors move target k
  std::vector<Ints> salient;   // [size], all bits set where salient
  std::vector<uint8_t> any_salient;
  std::vector<Floats> history;  // [size][kStates]: errors of the best path to each state; for a
                                // finished block the states are those at its end
  std::vector<Ints> origin;     // [blocks][kStates]: state at the end of a finished block from
                                // which the best path to each state comes
  std::vector<Ints> code;       // [size][kStates]: code, and 256 * u[k-2], of the path there
  std::vector<Floats> value;    // [size][kStates]
  std::vector<Floats> error;    // [size], of the path that was chosen

  Group(const FeedbackTask& task, const NearestEntries& tables)
      : task(task),
        tables(tables),
        effects(size_t(task.group_size) * task.group_size),
        salient(task.group_size),
        any_salient(task.group_size),
        history(size_t(task.group_size) * kStates),
        origin(size_t(task.group_size / kBlock + 1) * kStates),
        code(size_t(task.group_size) * kStates),
        value(size_t(task.group_size) * kStates),
        error(task.group_size) {}

  // What all rows share.
  void begin(int group) {
    start = group * task.group_size;
    size = int(std::min<int64_t>(task.group_size, task.columns - start));
    for (int j = 0; j < size; ++j)
      for (int k = j + 1; k < size; ++k)
        effects[size_t(k) * size + j] = task.effects[(start + j) * task.columns + start + k];
  }

  void load(int64_t first, int lanes, int group) {
    const int64_t stride = int64_t(task.groups) * task.group_size;
    unit = step = zero = Floats{};
    std::fill(salient.begin(), salient.end(), Ints{});
    for (int l = 0; l < lanes; ++l) {
      const int64_t at = (first + l) * task.groups + group;
      unit[l] = task.unit[at];
      step[l] = task.step[at];
      if (task.zero) zero[l] = task.zero[at];
      const uint8_t* const mask = task.salient + (first + l) * stride + start;
      for (int k = 0; k < size; ++k) salient[k][l] = -int32_t(mask[k]);
    }
    for (int k = 0; k < size; ++k) any_salient[k] = any(salient[k]);
  }

  // The salient code nearest to `target`.
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

  // The base code nearest to `scaled`, and its value in codebook units. `point` is its integer.
  Choice entry(int subset, Ints point) const {
    const int32_t* const rank = tables.rank.data() + subset * tables.width;
    const float* const value = tables.value.data() + subset * tables.width;
    Choice found;
    for (int l = 0; l < kLanes; ++l) found.code[l] = rank[point[l]];
    for (int l = 0; l < kLanes; ++l) found.value[l] = value[point[l]];
    return found;
  }

  Ints point_of(Floats scaled) const {
    const float end = float(task.limit);
    return to_ints(clamp(round_to_even(scaled), -end, end) + end);
  }

  Choice plain_choice(Floats target) const {
    const Floats scaled = or_zero(target * unit);
    if (!task.zero) return entry(0, point_of(scaled));
    const Floats code = clamp(round_to_even(zero + scaled), 0.0f, float(task.limit));
    return {to_ints(code), code - zero};
  }

  // Adds to each state's target the errors of the unfinished block and of the finished ones from
  // `merged` on. Earlier blocks have moved the target already.
  void add_errors(int k, int merged, Floats* target) const {
    const float* const effect = effects.data() + size_t(k) * size;
    const int block = k / kBlock;
    for (int b = merged; b <= block; ++b) {
      Floats sum[kStates] = {};
      const int end = std::min(k, (b + 1) * kBlock);
      for (int j = b * kBlock; j < end; ++j)
        for (int s = 0; s < kStates; ++s) sum[s] += history[size_t(j) * kStates + s] * effect[j];
      for (int s = 0; s < kStates; ++s) target[s] += b < block ? from(b, s, sum) : sum[s];
    }
  }

  // Of the states at the end of block b, the one that state s comes from.
  Floats from(int b, int s, const Floats* states) const {
    Floats found = states[0];
    for (int e = 1; e < kStates; ++e)
      found = origin[size_t(b) * kStates + s] == e ? states[e] : found;
    return found;
  }

  // Finished blocks whose errors are the same on all paths move the targets of the group at once.
  int merge(int merged, int finished, Floats* target) {
    for (; merged < finished; ++merged) {
      const Ints* const of = &origin[size_t(merged) * kStates];
      Ints differs = {};
      for (int s = 1; s < kStates; ++s) differs |= of[s] != of[0];
      if (any(differs)) break;
      Floats known[kBlock];
      for (int j = 0; j < kBlock; ++j)
        known[j] = from(merged, 0, &history[size_t(merged * kBlock + j) * kStates]);
      for (int k = finished * kBlock; k < size; ++k) {
        const float* const effect = effects.data() + size_t(k) * size + merged * kBlock;
        Floats sum = {};
        for (int j = 0; j < kBlock; ++j) sum += known[j] * effect[j];
        target[k] += sum;
      }
    }
    return merged;
  }

  // Codes, values and errors of the group; `rows.target` holds the target of each column.
  void search(Rows& rows) {
    Floats* const group_target = rows.target.data() + start;
    const Floats* const weight = rows.weight.data() + start;
    Floats cost[kStates];
    for (int s = 0; s < kStates; ++s) cost[s] = splat(s ? INFINITY : 0.0f);
    int merged = 0;
    for (int k = 0; k < size; ++k) {
      if (k && k % kBlock == 0) {
        const int b = k / kBlock - 1;
        for (int s = 0; s < kStates; ++s) origin[size_t(b) * kStates + s] = Ints{} + s;
        merged = merge(merged, b + 1, group_target);
      }
      Floats target[kStates];
      for (int s = 0; s < kStates; ++s) target[s] = group_target[k];
      add_errors(k, merged, target);
      if constexpr (kStates == 4) advance(rows, k, merged, target, weight[k], cost);
      else choose(rows, k, target[0], weight[k]);
    }
    if constexpr (kStates == 4) trace(cost);
    for (int k = 0; k < size; ++k) error[k] = weight[k] - value[k * kStates];
  }

  void choose(const Rows& rows, int k, Floats target, Floats weight) {
    Choice found = plain_choice(target);
    found.value *= step;
    if (any_salient[k]) {
      const Choice wide = salient_choice(rows, target);
      found.code = salient[k] ? wide.code : found.code;
      found.value = salient[k] ? wide.value : found.value;
    }
    code[k] = found.code;
    value[k] = found.value;
    history[k] = weight - found.value;
  }

  // One step of the Viterbi search. A state is 2 * u[k] + u[k-1].
  void advance(const Rows& rows, int k, int merged, const Floats* target, Floats weight,
               Floats* cost) {
    const float importance = task.importance[start + k];
    Floats metric[2][4];  // [u[k]][state before]
    Choice choice[2][4];
    for (int s = 0; s < 4; ++s) {
      const int last = s >> 1, before = s & 1;
      const Floats scaled = or_zero(target[s] * unit);
      const Ints point = point_of(scaled);
      for (int u = 0; u < 2; ++u) {
        Choice& found = choice[u][s];
        found = entry(2 * (u ^ before) + last, point);
        const Floats distance = scaled - found.value;
        metric[u][s] = distance * distance * importance;
        found.code = 2 * found.code + u;
        found.value *= step;
      }
    }
    if (any_salient[k]) {
      Choice wide[4];
      Floats wide_metric[4];
      for (int s = 0; s < 4; ++s) {
        wide[s] = salient_choice(rows, target[s]);
        const Floats distance = (target[s] - wide[s].value) * unit;
        wide_metric[s] = distance * distance * importance;
      }
      // Less the least of them: a cost that all paths have in common would only round others off.
      Floats least = wide_metric[0];
      for (int s = 1; s < 4; ++s) least = wide_metric[s] < least ? wide_metric[s] : least;
      for (int s = 0; s < 4; ++s) {
        const Floats extra = or_zero(wide_metric[s] - least);
        for (int u = 0; u < 2; ++u) {
          const Floats fits = (wide[s].code & 1) == u ? extra : splat(INFINITY);
          metric[u][s] = salient[k] ? fits : metric[u][s];
          choice[u][s].code = salient[k] ? wide[s].code : choice[u][s].code;
          choice[u][s].value = salient[k] ? wide[s].value : choice[u][s].value;
        }
      }
    }
    Floats next[4];
    Ints survivor[4];  // all bits set: u[k-2] is 1
    for (int u = 0; u < 2; ++u)
      for (int a = 0; a < 2; ++a) {
        const int s = 2 * u + a, zero = 2 * a, one = 2 * a + 1;
        const Floats from_0 = cost[zero] + metric[u][zero];
        const Floats from_1 = cost[one] + metric[u][one];
        const Ints better = from_1 < from_0;
        survivor[s] = better;
        next[s] = better ? from_1 : from_0;
        const size_t at = size_t(k) * 4 + s;
        code[at] = better ? choice[u][one].code + 256 : choice[u][zero].code;
        value[at] = better ? choice[u][one].value : choice[u][zero].value;
        history[at] = weight - value[at];
      }
    for (int s = 0; s < 4; ++s) cost[s] = next[s];
    for (int j = k / kBlock * kBlock; j < k; ++j) inherit(&history[size_t(j) * 4], survivor);
    for (int b = merged; b < k / kBlock; ++b) inherit(&origin[size_t(b) * 4], survivor);
  }

  // To each state, what its survivor had.
  template <typename T>
  static void inherit(T* states, const Ints* survivor) {
    const T was[4] = {states[0], states[1], states[2], states[3]};
    for (int s = 0; s < 4; ++s) {
      const int a = s & 1;
      states[s] = survivor[s] ? was[2 * a + 1] : was[2 * a];
    }
  }

  // Codes and values of the best path, from the last column back to the first; they are left at
  // the places of state 0.
  void trace(const Floats* cost) {
    Ints state = {};
    Floats least = cost[0];
    for (int s = 1; s < 4; ++s) {
      const Ints better = cost[s] < least;
      state = better ? Ints{} + s : state;
      least = better ? cost[s] : least;
    }
    for (int k = size - 1; k >= 0; --k) {
      Ints c = code[k * 4];
      Floats v = value[k * 4];
      for (int s = 1; s < 4; ++s) {
        c = state == s ? code[k * 4 + s] : c;
        v = state == s ? value[k * 4 + s] : v;
      }
      code[k * 4] = c & 255;
      value[k * 4] = v;
      state = 2 * (state & 1) + (c >> 8);
    }
  }

  // Moves the targets of all later groups.
  void push(Rows& rows) const {
    const int64_t columns = task.columns;
    for (int64_t first = start + size; first < columns; first += kTile) {
      const int width = int(std::min<int64_t>(kTile, columns - first));
      if (width == kTile) push_tile<kTile>(rows, first);
      else
        for (int x = 0; x < width; ++x) push_tile<1>(rows, first + x);
    }
  }

  template <int kWidth>
  void push_tile(Rows& rows, int64_t first) const {
    Floats moved[kWidth];
    for (int x = 0; x < kWidth; ++x) moved[x] = rows.target[first + x];
    for (int b = 0; b < size; b += kBlock) {
      Floats sum[kWidth] = {};
      const float* effect = task.effects + (start + b) * task.columns + first;
      for (int j = b; j < std::min(size, b + kBlock); ++j, effect += task.columns)
        for (int x = 0; x < kWidth; ++x) sum[x] += error[j] * effect[x];
      for (int x = 0; x < kWidth; ++x) moved[x] += sum[x];
    }
    for (int x = 0; x < kWidth; ++x) rows.target[first + x] = moved[x];
  }

  void store(int64_t first, int lanes) const {
    const int64_t stride = int64_t(task.groups) * task.group_size;
    for (int l = 0; l < lanes; ++l)
      for (int k = 0; k < size; ++k) {
        const int64_t at = (first + l) * stride + start + k;
        task.codes[at] = uint8_t(code[k * kStates][l]);
        task.values[at] = value[k * kStates][l];
      }
  }
};
