// The arithmetic of the CUDA kernels (cuda/rows.h), run here: by one lane, and by an imitated warp as on the GPU, against attention
// written out pair by pair. The grid is imitated too; shuffles and launches themselves are all that is left to a GPU.
#include "cuda/rows.h"

#include <limits>

#include "definition.h"
#include "warp.h"

using namespace treegrpo;
using namespace treegrpo::test;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// One lane that holds whole rows.
struct OneLane {
  static constexpr int kLanes = 1;
  int lane = 0;
  template <typename S>
  S sum(S x) const {
    return x;
  }
};

struct WarpLane {
  static constexpr int kLanes = Warp::kLanes;
  int lane;
  Warp* warp;
  template <typename S>
  S sum(S x) const {
    return warp->sum(lane, x);
  }
};

struct Single {
  template <typename Row>
  void operator()(const Row& row) {
    row(OneLane{});
  }
};

struct Together {
  Warp warp;
  template <typename Row>
  void operator()(const Row& row) {
    warp.run([&](int lane) { row(WarpLane{lane, &warp}); });
  }
};

// A [T, heads, dim] tensor laid out head by head with room after each row that nobody may read.
template <typename T>
struct Strided {
  static constexpr int64_t kRoom = 3;
  std::vector<T> values;
  cuda::View view;

  Strided(const std::vector<double>& from, int64_t tokens, int64_t heads, int64_t dim)
      : values(tokens * heads * (dim + kRoom), static_cast<T>(kNaN)), view{values.data(), dim + kRoom, tokens * (dim + kRoom)} {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; ++d)
          values[t * view.token_stride + h * view.head_stride + d] = static_cast<T>(from[(t * heads + h) * dim + d]);
  }
};

template <typename Row>
void grid(int64_t num_tokens, int64_t heads, const Row& row) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t block = 0; block < cuda::num_blocks(num_tokens); ++block)
      for (int64_t warp = 0; warp < cuda::kWarpsPerBlock; ++warp)
        if (cuda::token_of(block, warp) < num_tokens) row(cuda::token_of(block, warp), h);
}

template <int kElems, typename T, typename Run>
void by_rows(const Forest& forest, const Problem& p, Tensors& x, Run run) {
  const Shape& s = p.shape;
  const Mask mask{forest.subtree_end.data(), forest.position.data(), p.window};
  const Strided<T> q(x.q, s.num_tokens, s.num_heads, s.head_dim), k(x.k, s.num_tokens, s.num_kv_heads, s.head_dim);
  const Strided<T> v(x.v, s.num_tokens, s.num_kv_heads, s.value_dim), dout(x.dout, s.num_tokens, s.num_heads, s.value_dim);
  const std::vector<T> sinks(x.sinks.begin(), x.sinks.end());
  const auto poisoned = [](const std::vector<double>& like) { return std::vector<T>(like.size(), static_cast<T>(kNaN)); };
  auto out = poisoned(x.out), lse = poisoned(x.lse), delta = lse, dq = poisoned(x.dq), dk = poisoned(x.dk), dv = poisoned(x.dv);

  const cuda::ForwardCall forward{s, mask, p.score, q.view, k.view, v.view, p.has_sinks ? sinks.data() : nullptr,
                                  out.data(), lse.data()};
  grid(s.num_tokens, s.num_heads, [&](int64_t i, int64_t h) {
    run([&](const auto& group) { cuda::forward_row<kElems, T>(group, forward, i, h); });
  });
  const cuda::View out_view{out.data(), s.num_heads * s.value_dim, s.value_dim};
  const cuda::BackwardCall backward{s,          mask,         p.score,   dout.view, q.view,    k.view,   v.view, out_view,
                                    lse.data(), delta.data(), dq.data(), dk.data(), dv.data()};
  grid(s.num_tokens, s.num_heads, [&](int64_t i, int64_t h) {
    run([&](const auto& group) { cuda::dq_row<kElems, T>(group, backward, i, h); });
  });
  grid(s.num_tokens, s.num_kv_heads, [&](int64_t j, int64_t g) {
    run([&](const auto& group) { cuda::dkv_row<kElems, T>(group, backward, j, g); });
  });
  x.out.assign(out.begin(), out.end()), x.lse.assign(lse.begin(), lse.end());
  x.dq.assign(dq.begin(), dq.end()), x.dk.assign(dk.begin(), dk.end()), x.dv.assign(dv.begin(), dv.end());
}

static void compare_all(const Tensors& found, const Tensors& expected, double tolerance) {
  compare("out", found.out, expected.out, tolerance);
  compare("lse", found.lse, expected.lse, tolerance);
  compare("dq", found.dq, expected.dq, tolerance);
  compare("dk", found.dk, expected.dk, tolerance);
  compare("dv", found.dv, expected.dv, tolerance);
}

// The walks against the definition of visibility, for every pair.
static void walks() {
  for (unsigned seed = 0; seed < 40; ++seed) {
    const Forest forest = random_forest(1 + seed * 4, seed, 0.02 * (seed % 20));
    for (int64_t window : {0, 1, 2, 5, 30, 1000}) {
      const Mask mask{forest.subtree_end.data(), forest.position.data(), window};
      for (int64_t i = 0; i < forest.size(); ++i) {
        int64_t next = cuda::next_key(mask, i, 0);
        for (int64_t j = 0; j <= i; ++j) {
          if (!forest.sees(i, j, window)) continue;
          EXPECT(next == j, "query %d, window %d: key %d comes next, not %d", int(i), int(window), int(next), int(j));
          next = cuda::next_key(mask, i, j + 1);
        }
        EXPECT(next > i, "query %d, window %d: key %d is not to be seen", int(i), int(window), int(next));
      }
      for (int64_t j = 0; j < forest.size(); ++j) {
        const int64_t end = forest.subtree_end[j];
        int64_t next = j;
        for (int64_t i = j; i < forest.size(); ++i) {
          if (!forest.sees(i, j, window)) continue;
          EXPECT(next == i, "key %d, window %d: row %d comes next, not %d", int(j), int(window), int(next), int(i));
          next = cuda::next_row(mask, j, end, i + 1);
        }
        EXPECT(next >= end, "key %d, window %d: row %d does not see it", int(j), int(window), int(next));
      }
    }
  }
}

// A subtree_end that is no forest must not hang a GPU.
static void walks_end() {
  const std::vector<int32_t> wrong(50, 0), position(50, 0);
  for (int64_t window : {0, 3}) {
    const Mask mask{wrong.data(), position.data(), window};
    for (int64_t i = 0; i < 50; ++i) EXPECT(cuda::next_key(mask, i, 0) > i, "no key is visible");
  }
}

int main() {
  walks();
  walks_end();
  const Problem problems[] = {
      {{61, 2, 2, 8, 8}, {0.35, 0}, 0, false},  {{90, 4, 1, 5, 11}, {0.5, 0}, 0, true},   {{80, 2, 1, 16, 3}, {0.3, 2.0}, 17, true},
      {{47, 1, 1, 33, 64}, {-0.2, 0}, 1, false}, {{50, 3, 3, 64, 31}, {0.1, 30}, 6, false}, {{33, 4, 2, 1, 1}, {0.0, 0}, 0, true},
      {{1, 2, 1, 7, 9}, {1.0, 0}, 0, false},     {{36, 2, 1, 40, 17}, {12.0, 0}, 0, true},
  };
  int runs = 0;
  unsigned seed = 0;
  for (const Problem& p : problems)
    for (double branch : {0.02, 0.3}) {
      const Forest forest = random_forest(p.shape.num_tokens, ++seed, branch);
      Tensors expected = inputs(p, seed);
      by_definition(forest, p, expected);
      const auto check = [&](auto run, double tolerance) {
        Tensors found = inputs(p, seed);
        run(found);
        compare_all(found, expected, tolerance);
        ++runs;
      };
      check([&](Tensors& x) { by_rows<64, double>(forest, p, x, Single{}); }, 1e-11);
      check([&](Tensors& x) { by_rows<2, double>(forest, p, x, Together{}); }, 1e-11);
      if (std::abs(p.score.scale) <= 1) check([&](Tensors& x) { by_rows<2, float>(forest, p, x, Together{}); }, 1e-4);
    }
  // wide rows: every size of row the kernels are compiled for, at its limits and just below
  for (int64_t dim : {65, 127, 128, 129, 255, 256}) {
    const Problem p{{21, 2, 1, dim, dim - 64}, {0.05, 0}, 9, true}, mirrored{{21, 2, 1, dim - 64, dim}, {0.05, 3.0}, 0, false};
    for (const Problem& wide : {p, mirrored}) {
      const Forest forest = random_forest(wide.shape.num_tokens, ++seed, 0.2);
      Tensors expected = inputs(wide, seed), found = expected;
      by_definition(forest, wide, expected);
      if (dim <= 128) by_rows<4, double>(forest, wide, found, Together{});
      else by_rows<8, double>(forest, wide, found, Together{});
      compare_all(found, expected, 1e-11);
      ++runs;
    }
  }
  std::printf("cuda rows: %d runs ok\n", runs);
}
