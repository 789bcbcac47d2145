// Attention and its gradient written out pair by pair in double, and random inputs; what the C++ tests compare with.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "../params.h"
#include "forest.h"

namespace treegrpo::test {

struct Problem {
  Shape shape;
  Score score;
  int64_t window;
  bool has_sinks;
};

inline std::vector<double> random_values(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(size);
  for (double& value : x) value = normal(random);
  return x;
}

struct Tensors {
  std::vector<double> q, k, v, dout, sinks, out, lse, dq, dk, dv;
};

inline Tensors inputs(const Problem& p, unsigned seed) {
  const Shape& s = p.shape;
  Tensors x;
  x.q = random_values(s.num_tokens * s.num_heads * s.head_dim, seed);
  x.k = random_values(s.num_tokens * s.num_kv_heads * s.head_dim, seed + 1);
  x.v = random_values(s.num_tokens * s.num_kv_heads * s.value_dim, seed + 2);
  x.dout = random_values(s.num_tokens * s.num_heads * s.value_dim, seed + 3);
  x.sinks = random_values(s.num_heads, seed + 4);
  x.out.assign(x.dout.size(), 0);
  x.lse.assign(s.num_tokens * s.num_heads, 0);
  x.dq.assign(x.q.size(), 0);
  x.dk.assign(x.k.size(), 0);
  x.dv.assign(x.v.size(), 0);
  return x;
}

inline void by_definition(const Forest& forest, const Problem& p, Tensors& x) {
  const Shape& s = p.shape;
  const int64_t group = s.num_heads / s.num_kv_heads;
  for (int64_t i = 0; i < s.num_tokens; ++i)
    for (int64_t h = 0; h < s.num_heads; ++h) {
      const int64_t at = i * s.num_heads + h, kv_head = h / group;
      std::vector<int64_t> keys;
      std::vector<double> scores, slopes;
      double total = p.has_sinks ? std::exp(x.sinks[h]) : 0;
      for (int64_t j = 0; j <= i; ++j) {
        if (!forest.sees(i, j, p.window)) continue;
        double score = 0, slope = 1;
        for (int64_t d = 0; d < s.head_dim; ++d)
          score += x.q[at * s.head_dim + d] * x.k[(j * s.num_kv_heads + kv_head) * s.head_dim + d];
        score *= p.score.scale;
        if (p.score.softcap > 0) {
          const double t = std::tanh(score / p.score.softcap);
          score = p.score.softcap * t;
          slope = 1 - t * t;
        }
        keys.push_back(j), scores.push_back(score), slopes.push_back(slope);
        total += std::exp(score);
      }
      x.lse[at] = std::log(total);
      double delta = 0;
      for (size_t n = 0; n < keys.size(); ++n)
        for (int64_t d = 0; d < s.value_dim; ++d) {
          const double part = std::exp(scores[n] - x.lse[at]) * x.v[(keys[n] * s.num_kv_heads + kv_head) * s.value_dim + d];
          x.out[at * s.value_dim + d] += part;
          delta += part * x.dout[at * s.value_dim + d];
        }
      for (size_t n = 0; n < keys.size(); ++n) {
        const int64_t key = keys[n] * s.num_kv_heads + kv_head;
        const double probability = std::exp(scores[n] - x.lse[at]);
        double dp = 0;
        for (int64_t d = 0; d < s.value_dim; ++d) {
          dp += x.dout[at * s.value_dim + d] * x.v[key * s.value_dim + d];
          x.dv[key * s.value_dim + d] += probability * x.dout[at * s.value_dim + d];
        }
        const double ds = probability * (dp - delta) * slopes[n] * p.score.scale;
        for (int64_t d = 0; d < s.head_dim; ++d) {
          x.dq[at * s.head_dim + d] += ds * x.k[key * s.head_dim + d];
          x.dk[key * s.head_dim + d] += ds * x.q[at * s.head_dim + d];
        }
      }
    }
}

inline void compare(const char* name, const std::vector<double>& found, const std::vector<double>& expected,
                    double tolerance = 1e-11) {
  for (size_t at = 0; at < found.size(); ++at)
    EXPECT(std::abs(found[at] - expected[at]) < tolerance, "%s[%zu] = %.17g, not %.17g", name, at, found[at], expected[at]);
}

}  // namespace treegrpo::test
