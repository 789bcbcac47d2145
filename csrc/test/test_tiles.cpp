// tiles.h against brute force: skipped tiles hold no visible pair, full ones only visible pairs, lists and row ranges lose
// no tile.
#include "tiles.h"

#include "forest.h"

using namespace treegrpo;
using test::Forest;

static int count_visible(const Forest& forest, int64_t r0, int64_t n0, int64_t rows, int64_t keys, int64_t window) {
  int visible = 0;
  for (int64_t i = r0; i < std::min(r0 + rows, forest.size()); ++i)
    for (int64_t j = n0; j < std::min(n0 + keys, forest.size()); ++j) visible += forest.sees(i, j, window);
  return visible;
}

static void check_tiles(const Forest& forest, int32_t num_rows, int32_t num_keys, int32_t window) {
  const int64_t num_tokens = forest.size(), padded = (num_tokens + 95) / 96 * 96;
  const auto blocks = [&](int32_t size) {
    return summarise(forest.subtree_end.data(), forest.position.data(), num_tokens, padded, size);
  };
  const Blocks keys = blocks(num_keys), rows = blocks(num_rows);
  const VisibleLists lists = visible_lists(keys, rows, window);
  for (int32_t r = 0; r < rows.count(); ++r) {
    std::vector<bool> listed(keys.count(), false);
    for (int64_t e = lists.offsets[r]; e < lists.offsets[r + 1]; ++e) {
      EXPECT(e == lists.offsets[r] || lists.indices[e - 1] < lists.indices[e], "list of %d does not ascend", r);
      listed[lists.indices[e]] = true;
    }
    for (int32_t n = 0; n < keys.count(); ++n) {
      const int visible = count_visible(forest, int64_t{r} * num_rows, int64_t{n} * num_keys, num_rows, num_keys, window);
      const Tile tile = classify(keys, n, rows, r, window);
      if (tile == Tile::kSkip) EXPECT(visible == 0, "tile %d, %d skipped with %d pairs", r, n, visible);
      if (tile == Tile::kFull) EXPECT(visible == num_rows * num_keys, "tile %d, %d full with %d pairs", r, n, visible);
      // without a window the classes are exact
      if (!window && visible == 0) EXPECT(tile == Tile::kSkip, "tile %d, %d holds nothing", r, n);
      if (!window && visible == num_rows * num_keys) EXPECT(tile == Tile::kFull, "tile %d, %d is full", r, n);
      EXPECT(listed[n] == (tile != Tile::kSkip), "tile %d, %d listed %d", r, n, int(listed[n]));
      const BlockRange range = row_range(keys, n, rows);
      if (visible) EXPECT(range.first <= r && r < range.last, "row block %d outside the range of key block %d", r, n);
    }
  }
}

int main() {
  int forests = 0;
  for (unsigned seed = 0; seed < 30; ++seed)
    for (double branch : {0.0, 0.05, 0.4}) {
      const Forest forest = test::random_forest(1 + seed * 4, seed, branch);
      for (auto [rows, keys] : {std::pair{8, 8}, {12, 8}, {12, 32}, {1, 1}, {96, 32}, {32, 96}})
        for (int window : {0, 1, 5, 40}) check_tiles(forest, rows, keys, window);
      ++forests;
    }
  std::printf("tiles: %d random forests ok\n", forests);
}
