// Sixteen numbers side by side, one per lane. The compiler makes vector instructions of them.

#pragma once

#include <cmath>
#include <cstdint>

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats splat(float x) { return Floats{} + x; }

inline Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }

inline Floats or_zero(Floats x) { return x == x ? x : Floats{}; }  // for what is not a number

inline Floats round_to_even(Floats x) {
  for (int l = 0; l < kLanes; ++l) x[l] = std::nearbyint(x[l]);
  return x;
}

inline Floats clamp(Floats x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

inline bool any(Ints x) {
  int32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= x[l];
  return bits != 0;
}
