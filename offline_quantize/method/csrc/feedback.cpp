// Codes of a weight with error feedback, several rows side by side, one per lane.
//
// The error of each column moves the target of later columns. In a trellis every path that is kept
// has its own errors, so the search makes the whole row's loss small. Each group is searched with
// several scales, and the one of least loss is taken.
//
// It does the arithmetic of `feedback_torch.py` in the same order, so both give the same codes. The
// order of sums: the errors of kBlock neighbouring columns are summed up from the first to the
// last, and that sum is added to the target, block by block.

#include <algorithm>
#include <new>
#include <vector>

#include "feedback_group.h"

namespace {

constexpr int kRows = 128;  // rows that are taken through a group before the next group
#ifdef __AVX512F__
constexpr int kTile = 16;  // columns whose sums are in registers at once
#else
constexpr int kTile = 4;
#endif

template <int kWidth, typename AGroup>
void push_tile(const AGroup& group, Rows& rows, int64_t first) {
  const FeedbackTask& task = group.task;
  Floats moved[kWidth];
  for (int x = 0; x < kWidth; ++x) moved[x] = rows.target[first + x];
  for (int b = 0; b < group.size; b += kBlock) {
    Floats sum[kWidth] = {};
    const float* effect = task.effects + (group.start + b) * task.columns + first;
    for (int j = b; j < std::min(group.size, b + kBlock); ++j, effect += task.columns)
      for (int x = 0; x < kWidth; ++x) sum[x] += group.error[j] * effect[x];
    for (int x = 0; x < kWidth; ++x) moved[x] += sum[x];
  }
  for (int x = 0; x < kWidth; ++x) rows.target[first + x] = moved[x];
}

// Moves the targets of all later groups.
template <typename AGroup>
void push(const AGroup& group, Rows& rows) {
  int64_t first = group.start + group.size;
  for (; first + kTile <= group.task.columns; first += kTile) push_tile<kTile>(group, rows, first);
  for (; first < group.task.columns; ++first) push_tile<1>(group, rows, first);
}

template <typename AGroup>
void store(const AGroup& group, int number, int64_t first, int lanes) {
  const FeedbackTask& task = group.task;
  const int64_t stride = int64_t(task.groups) * task.group_size;
  for (int l = 0; l < lanes; ++l) {
    task.chosen[(first + l) * task.groups + number] = uint8_t(group.chosen[l]);
    for (int k = 0; k < group.size; ++k) {
      const int64_t at = (first + l) * stride + group.start + k;
      task.codes[at] = uint8_t(group.code[k][l]);
      task.values[at] = group.value[k][l];
    }
  }
}

template <int kStates>
void encode(const FeedbackTask& task) {
  const NearestEntries entries(task.codebook, task.codebook_size, task.limit, kStates);
  Group<kStates> group(task, entries);
  std::vector<Rows> blocks(kRows / kLanes);
  for (int64_t top = 0; top < task.rows; top += kRows) {
    const int rows = int(std::min<int64_t>(kRows, task.rows - top));
    const int count = (rows + kLanes - 1) / kLanes;
    const auto lanes = [&](int i) { return std::min(kLanes, rows - i * kLanes); };
    for (int i = 0; i < count; ++i) blocks[i].load(task, top + i * kLanes, lanes(i));
    for (int g = 0; g < task.groups; ++g) {
      group.begin(g);
      for (int i = 0; i < count; ++i) {
        group.encode(blocks[i], top + i * kLanes, lanes(i));
        store(group, g, top + i * kLanes, lanes(i));
        push(group, blocks[i]);
      }
    }
  }
}

}  // namespace

// Returns 0, or 1 if the memory is not enough.
extern "C" int32_t encode_with_feedback(const FeedbackTask* task) {
  try {
    task->trellis ? encode<4>(*task) : encode<1>(*task);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
