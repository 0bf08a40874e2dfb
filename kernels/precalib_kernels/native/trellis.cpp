// Viterbi search through the trellis of `layout.py`, sixteen groups side by side.
//
// It does the arithmetic of `trellis.search_torch` in the same order, so both give the same codes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Tables {
  int limit;
  std::vector<int32_t> rank[4];  // best level of a subset for each point, counted in the subset
  std::vector<float> value[4];   // and its value

  Tables(const int32_t* levels, int count, int limit) : limit(limit) {
    for (int s = 0; s < 4; ++s)
      for (int point = -limit; point <= limit; ++point) {
        int best = 0;
        for (int j = 1; 4 * j + s < count; ++j)
          if (std::abs(point - levels[4 * j + s]) < std::abs(point - levels[4 * best + s])) best = j;
        rank[s].push_back(best);
        value[s].push_back(float(levels[4 * best + s]));
      }
  }
};

}  // namespace

// weights: [groups][size];  unit: [groups], levels per weight unit;  forced: [groups][size], low bit
// of the code where it is given, else 2;  results: codes and level values, [groups][size].
extern "C" void trellis_search(const float* weights, const float* unit, const uint8_t* forced,
                               const int32_t* levels, int32_t level_count, int32_t limit,
                               int64_t groups, int32_t size, uint8_t* codes,
                               float* values) {
  const Tables tables(levels, level_count, limit);
  const float end = float(limit);
  std::vector<Ints> came(size_t(size) * 4);   // u[k-2] of the best way into state (u[k], u[k-1])
  std::vector<int32_t> points(size_t(size) * kLanes);
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, groups - first));
    Floats cost[2][2];  // [u[k-1]][u[k-2]]
    for (auto& row : cost)
      for (auto& c : row) c = Floats{} + INFINITY;
    cost[0][0] = Floats{};
    for (int k = 0; k < size; ++k) {
      Floats error[4] = {}, barrier[2] = {};
      for (int l = 0; l < lanes; ++l) {
        const int64_t at = (first + l) * size + k;
        const float scaled = weights[at] * unit[first + l];
        const float point = std::fmin(std::fmax(std::nearbyint(scaled), -end), end);
        const int index = int(point + end);
        points[size_t(k) * kLanes + l] = index;
        const bool free = forced[at] > 1;
        for (int s = 0; s < 4; ++s) {
          const float off = scaled - tables.value[s][index];
          error[s][l] = free ? off * off : 0.0f;
        }
        if (!free) barrier[1 - forced[at]][l] = INFINITY;
      }
      Floats next[2][2];
      for (int u = 0; u < 2; ++u)
        for (int a = 0; a < 2; ++a) {
          const Floats stay = cost[a][0] + error[2 * u + a];
          const Floats turn = cost[a][1] + error[2 * (u ^ 1) + a];
          const Ints turned = turn < stay;
          came[size_t(k) * 4 + 2 * u + a] = turned;
          next[u][a] = (turned ? turn : stay) + barrier[u];
        }
      for (int u = 0; u < 2; ++u)
        for (int a = 0; a < 2; ++a) cost[u][a] = next[u][a];
    }
    for (int l = 0; l < lanes; ++l) {
      int state = 0;
      for (int s = 1; s < 4; ++s)
        if (cost[s >> 1][s & 1][l] < cost[state >> 1][state & 1][l]) state = s;
      for (int k = size - 1; k >= 0; --k) {
        const int before = came[size_t(k) * 4 + state][l] & 1, now = state >> 1, last = state & 1;
        const int subset = 2 * (now ^ before) + last;
        const int point = points[size_t(k) * kLanes + l];
        codes[(first + l) * size + k] = uint8_t(2 * tables.rank[subset][point] + now);
        values[(first + l) * size + k] = tables.value[subset][point];
        state = 2 * last + before;
      }
    }
  }
}
