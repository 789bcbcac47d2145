// The CPU kernels, every instruction set of this machine, against attention written out pair by pair in double.
#include "cpu/attention.h"

#include <cmath>
#include <stdexcept>
#include <thread>

#include "forest.h"

using namespace treegrpo;
using test::Forest;

struct Problem {
  Shape shape;
  Score score;
  int64_t window;
  bool has_sinks;
};

static std::vector<double> random_values(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(size);
  for (double& value : x) value = normal(random);
  return x;
}

struct Tensors {
  std::vector<double> q, k, v, dout, sinks, out, lse, dq, dk, dv;
};

static Tensors inputs(const Problem& p, unsigned seed) {
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

static void by_definition(const Forest& forest, const Problem& p, Tensors& x) {
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

static void threads(int64_t num_workers, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> pool;
  for (int64_t worker = 0; worker < num_workers; ++worker) pool.emplace_back(body, worker);
  for (std::thread& thread : pool) thread.join();
}

static void by_kernel(const Forest& forest, const Problem& p, Tensors& x) {
  const Mask mask{forest.subtree_end.data(), forest.position.data(), p.window};
  const double* sinks = p.has_sinks ? x.sinks.data() : nullptr;
  cpu::forward({Type::kFloat64, p.shape, mask, p.score, x.q.data(), x.k.data(), x.v.data(), sinks, x.out.data(),
                x.lse.data(), 3, threads});
  cpu::backward({Type::kFloat64, p.shape, mask, p.score, x.dout.data(), x.q.data(), x.k.data(), x.v.data(), x.out.data(),
                 x.lse.data(), x.dq.data(), x.dk.data(), x.dv.data(), 3, threads});
}

static void compare(const char* name, const std::vector<double>& found, const std::vector<double>& expected) {
  for (size_t at = 0; at < found.size(); ++at)
    EXPECT(std::abs(found[at] - expected[at]) < 1e-11, "%s[%zu] = %.17g, not %.17g", name, at, found[at], expected[at]);
}

int main() {
  const Problem problems[] = {
      {{150, 2, 2, 8, 8}, {0.35, 0}, 0, false},
      {{203, 4, 1, 5, 11}, {0.5, 0}, 0, true},
      {{300, 2, 1, 16, 3}, {0.3, 2.0}, 17, true},
      {{97, 1, 1, 33, 33}, {-0.2, 0}, 1, false},
  };
  int runs = 0;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    try {
      cpu::set_isa(isa);
    } catch (const std::invalid_argument&) {
      continue;
    }
    unsigned seed = 0;
    for (const Problem& p : problems)
      for (double branch : {0.02, 0.3}) {
        const Forest forest = test::random_forest(p.shape.num_tokens, ++seed, branch);
        Tensors expected = inputs(p, seed), found = inputs(p, seed);
        by_definition(forest, p, expected);
        by_kernel(forest, p, found);
        compare("out", found.out, expected.out);
        compare("lse", found.lse, expected.lse);
        compare("dq", found.dq, expected.dq);
        compare("dk", found.dk, expected.dk);
        compare("dv", found.dv, expected.dv);
        ++runs;
      }
  }
  std::printf("attention: %d runs ok, best instruction set %s\n", runs, (cpu::set_isa(""), cpu::isa()));
}
