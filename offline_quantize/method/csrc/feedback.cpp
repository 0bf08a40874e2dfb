// Codes of a weight with error feedback, sixteen rows side by side, one per lane.
//
// The error of each column moves the target of later columns. In a trellis each of the four states
// has its own errors, those of the best path to it, so the search makes the whole row's loss small.
// It does the arithmetic of `feedback_torch.py` in the same order, so both give the same codes. The
// order of sums: the errors of kBlock neighbouring columns are summed up from the first to the
// last, and that sum is added to the target, block by block.

#include <algorithm>
#include <vector>

#include "feedback_group.h"

namespace {

constexpr int kRows = 128;  // rows that are taken through a group before the next group

template <int kStates>
void encode(const FeedbackTask& task) {
  const NearestEntries tables(task.codebook, task.codebook_size, task.limit, kStates);
  Group<kStates> group(task, tables);
  std::vector<Rows> blocks(kRows / kLanes);
  for (int64_t first = 0; first < task.rows; first += kRows) {
    const int rows = int(std::min<int64_t>(kRows, task.rows - first));
    const int count = (rows + kLanes - 1) / kLanes;
    const auto lanes = [&](int i) { return std::min(kLanes, rows - i * kLanes); };
    for (int i = 0; i < count; ++i) blocks[i].load(task, first + i * kLanes, lanes(i));
    for (int g = 0; g < task.groups; ++g) {
      group.begin(g);
      for (int i = 0; i < count; ++i) {
        group.load(first + i * kLanes, lanes(i), g);
        group.search(blocks[i]);
        group.store(first + i * kLanes, lanes(i));
        group.push(blocks[i]);
      }
    }
  }
}

}  // namespace

extern "C" void encode_with_feedback(const FeedbackTask* task) {
  task->trellis ? encode<4>(*task) : encode<1>(*task);
}
