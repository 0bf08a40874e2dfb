// What csrc/feedback.cpp is given.

#pragma once

#include <cstdint>

extern "C" {

// What is encoded. `feedback.py` has the same structure.
struct FeedbackTask {
  int64_t rows, columns;
  int32_t group_size, groups, candidates;
  const float* weights;     // [rows][groups * group_size], zeros in the padding at the end
  const float* effects;     // [columns][columns], row j: how the error of j moves each later target
  const float* importance;  // [columns], of a squared error there
  const uint8_t* salient;   // like weights: 1 at salient places
  const float* unit;        // [candidates][rows][groups], codebook units per weight unit
  const float* step;        // the same, weight units per codebook unit
  const float* zero;        // the same, zero point; null unless the codebook is uniform
  const int32_t* codebook;  // null if it is uniform
  int32_t codebook_size, limit, trellis;
  // A salient value is offset + scale * m with low <= m <= high, and its code m + bias. If sign is
  // not zero, m stands for the magnitude, and sign is added to the code of a negative value.
  const float *salient_inverse, *salient_scale, *salient_offset;  // [rows]
  int32_t salient_low, salient_high, salient_bias, salient_sign;
  uint8_t* codes;   // like weights: whole codes at salient places, elsewhere base codes
  float* values;    // like weights: what they stand for
  uint8_t* chosen;  // [rows][groups]: candidate of least loss
};
}
