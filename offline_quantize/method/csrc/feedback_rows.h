// Rows of a weight, as many as there are lanes.

#pragma once

#include <cstdint>
#include <vector>

#include "feedback_task.h"
#include "lanes.h"

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
