// tiles.h against brute force: every visible pair lies in exactly one region, "full" regions hold only visible pairs, and the
// runs of the backward cover every key tile once.
#include "tiles.h"

#include "forest.h"

using namespace treegrpo;
using test::Forest;

static void check_regions(const Forest& forest, int64_t block_m, int64_t block_n, int64_t window) {
  const int64_t num_tokens = forest.size();
  const KeyTiles tiles = key_tiles(forest.subtree_end.data(), forest.position.data(), num_tokens, block_n);
  std::vector<int> covered(num_tokens * num_tokens, 0);
  for (int64_t m0 = 0; m0 < num_tokens; m0 += block_m) {
    const int64_t m1 = std::min(num_tokens, m0 + block_m);
    const auto [low, high] = std::minmax_element(forest.position.begin() + m0, forest.position.begin() + m1);
    for (int64_t n = 0; n * block_n < m1; ++n) {
      const Region r = region(tiles, n, num_tokens, m0, m1, window, *low, *high);
      if (r.empty()) continue;
      EXPECT(r.row0 >= m0 && r.row1 <= m1 && r.key0 == n * block_n && r.key1 <= num_tokens && r.key0 < r.key1, "region");
      for (int64_t i = r.row0; i < r.row1; ++i)
        for (int64_t j = r.key0; j < r.key1; ++j) {
          ++covered[i * num_tokens + j];
          if (r.full) EXPECT(forest.sees(i, j, window), "full, but %ld does not see %ld", long(i), long(j));
        }
    }
  }
  for (int64_t i = 0; i < num_tokens; ++i)
    for (int64_t j = 0; j < num_tokens; ++j) {
      const int times = covered[i * num_tokens + j];
      EXPECT(times <= 1, "pair %ld, %ld in %d regions", long(i), long(j), times);
      if (forest.sees(i, j, window)) EXPECT(times == 1, "pair %ld, %ld is lost", long(i), long(j));
    }
}

static void check_chunks(const Forest& forest, int64_t block_n) {
  const KeyTiles tiles = key_tiles(forest.subtree_end.data(), forest.position.data(), forest.size(), block_n);
  for (int64_t num_chunks : {1, 2, 3, 8, 100}) {
    const std::vector<int64_t> cuts = balanced_chunks(tiles, num_chunks);
    EXPECT(cuts.front() == 0 && cuts.back() == int64_t(tiles.end_max.size()), "chunks leave tiles out");
    for (size_t c = 1; c < cuts.size(); ++c) EXPECT(cuts[c - 1] <= cuts[c], "chunks overlap");
  }
}

int main() {
  int forests = 0;
  for (unsigned seed = 0; seed < 30; ++seed)
    for (double branch : {0.0, 0.05, 0.4}) {
      const Forest forest = test::random_forest(1 + seed * 4, seed, branch);
      for (auto [block_m, block_n] : {std::pair{8, 8}, {12, 8}, {8, 16}, {1, 1}, {64, 32}})
        for (int64_t window : {0, 1, 5, 40}) check_regions(forest, block_m, block_n, window);
      check_chunks(forest, 8);
      ++forests;
    }
  std::printf("tiles: %d random forests ok\n", forests);
}
