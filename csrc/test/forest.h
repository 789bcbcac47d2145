// Random forests and the definition of visibility by walking paths; what the C++ tests compare with.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace treegrpo::test {

struct Forest {
  std::vector<int32_t> parent;       // -1 at a root
  std::vector<int32_t> subtree_end;  // [T]
  std::vector<int32_t> position;     // [T] depth in tokens

  int64_t size() const { return static_cast<int64_t>(parent.size()); }

  // By walking up from i: j is i or above it, and near enough on the path.
  bool sees(int64_t i, int64_t j, int64_t window) const {
    int64_t distance = 0;
    for (int64_t at = i; at >= 0; at = parent[at], ++distance)
      if (at == j) return !window || distance < window;
    return false;
  }
};

// Depth-first: a token continues the last one, forks from something on its path, or starts a new tree.
inline Forest random_forest(int64_t num_tokens, unsigned seed, double branch) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  Forest forest;
  std::vector<int32_t> path;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const double draw = uniform(random);
    if (draw < 0.01) path.clear();
    else if (draw < 0.01 + branch && !path.empty()) path.resize(1 + random() % path.size());
    forest.parent.push_back(path.empty() ? -1 : path.back());
    forest.position.push_back(static_cast<int32_t>(path.size()));
    path.push_back(static_cast<int32_t>(t));
  }
  for (int64_t t = 0; t < num_tokens; ++t) forest.subtree_end.push_back(static_cast<int32_t>(t + 1));
  for (int64_t t = num_tokens - 1; t >= 0; --t)
    if (forest.parent[t] >= 0) {
      int32_t& above = forest.subtree_end[forest.parent[t]];
      above = std::max(above, forest.subtree_end[t]);
    }
  return forest;
}

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                          \
      std::fprintf(stderr, "\n");                                 \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

}  // namespace treegrpo::test
