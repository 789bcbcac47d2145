// Which tiles meet: the tile rules of kernels/treegrpo_kernels/plan.py for one key tile at a time. No torch, no SIMD.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace treegrpo {

// Extremes over the keys of every key tile of `block` keys.
struct KeyTiles {
  int64_t block;
  std::vector<int32_t> end_max;  // [NK] rows from here on see no key of the tile
  std::vector<int32_t> end_min;  // [NK] rows below this see every key before them
  std::vector<int32_t> pos_min;  // [NK]
  std::vector<int32_t> pos_max;  // [NK]
};

inline KeyTiles key_tiles(const int32_t* subtree_end, const int32_t* position, int64_t num_tokens, int64_t block) {
  const int64_t num_tiles = (num_tokens + block - 1) / block;
  KeyTiles tiles{block, {}, {}, {}, {}};
  for (auto* x : {&tiles.end_max, &tiles.end_min, &tiles.pos_min, &tiles.pos_max}) x->resize(num_tiles);
  for (int64_t n = 0; n < num_tiles; ++n) {
    const int64_t n0 = n * block, n1 = std::min(num_tokens, n0 + block);
    const auto [end_min, end_max] = std::minmax_element(subtree_end + n0, subtree_end + n1);
    const auto [pos_min, pos_max] = std::minmax_element(position + n0, position + n1);
    tiles.end_min[n] = *end_min;
    tiles.end_max[n] = *end_max;
    tiles.pos_min[n] = *pos_min;
    tiles.pos_max[n] = *pos_max;
  }
  return tiles;
}

// The part of a (query tile, key tile) pair that holds visible pairs: rows [row0, row1), keys [n0, key1).
struct Region {
  int64_t row0, row1;
  int64_t key0, key1;
  bool full;  // every pair of the region is visible
  bool empty() const { return row0 >= row1; }
};

// Rows [m0, m1) against key tile n. A row before the tile or past its last subtree sees nothing of it, so rows are cut exactly;
// keys past the last row are cut too. `row_pos_*` are the extremes of position over the query tile.
inline Region region(const KeyTiles& tiles, int64_t n, int64_t num_tokens, int64_t m0, int64_t m1, int64_t window,
                     int32_t row_pos_min, int32_t row_pos_max) {
  const int64_t n0 = n * tiles.block, n1 = std::min(num_tokens, n0 + tiles.block);
  Region r{};
  r.row0 = std::max(m0, n0);
  r.row1 = std::min<int64_t>(m1, tiles.end_max[n]);
  r.key0 = n0;
  r.key1 = std::min(n1, r.row1);
  if (window && row_pos_min - tiles.pos_max[n] >= window) r.row1 = r.row0;
  r.full = r.key1 == n0 + tiles.block && r.row0 >= n1 - 1 && r.row1 <= tiles.end_min[n] &&
           (!window || row_pos_max - tiles.pos_min[n] < window);
  return r;
}

// Cuts the key tiles into `num_chunks` runs of about equal work: [num_chunks + 1] tile indices, a function of the tree alone.
inline std::vector<int64_t> balanced_chunks(const KeyTiles& tiles, int64_t num_chunks) {
  const int64_t num_tiles = static_cast<int64_t>(tiles.end_max.size());
  std::vector<int64_t> cuts(num_chunks + 1, num_tiles);
  double total = 0;
  for (int64_t n = 0; n < num_tiles; ++n) total += tiles.end_max[n] - n * tiles.block;
  double before = 0;
  int64_t chunk = 0;
  for (int64_t n = 0; n < num_tiles; ++n) {
    while (chunk < num_chunks && before >= total * chunk / num_chunks) cuts[chunk++] = n;
    before += tiles.end_max[n] - n * tiles.block;
  }
  return cuts;
}

}  // namespace treegrpo
