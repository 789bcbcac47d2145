// Which tiles meet, as pure host arithmetic: no torch, no kernels.
//
// Visibility is one integer per key: j is seen by query i iff j <= i < subtree_end[j] (and, under a window W,
// position[i] - position[j] < W). For a block of keys [n0, n1) with max_end and min_end over its keys and a block of query
// rows [r0, r1):
//     skip     r1 <= n0  or  max_end <= r0               or  every pair is out of the window
//     full     r0 >= n1 - 1  and  r1 <= min_end          and every pair is in the window
//     partial  otherwise
// so the rows that meet a key block are the contiguous range [n0, max_end).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace treegrpo {

enum class Tile { kSkip, kFull, kPartial };

// Summary of consecutive blocks of `size` tokens, as keys and as query rows. A block with tokens past the end has
// min_end = 0 and is therefore never full.
struct Blocks {
  int32_t size = 0;
  std::vector<int32_t> max_end, min_end;  // [num_blocks] over the block's keys
  std::vector<int32_t> min_pos, max_pos;  // [num_blocks]

  int32_t count() const { return static_cast<int32_t>(max_end.size()); }
};

// `padded` tokens, the first `num_tokens` of them real; padded % size == 0. Ends are clamped to [0, num_tokens].
inline Blocks summarise(const int32_t* subtree_end, const int32_t* position, int64_t num_tokens, int64_t padded,
                        int32_t size) {
  Blocks blocks;
  blocks.size = size;
  const int64_t count = padded / size;
  blocks.max_end.assign(count, 0);
  blocks.min_end.assign(count, 0);
  blocks.min_pos.assign(count, INT32_MAX);
  blocks.max_pos.assign(count, 0);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = b * size, last = std::min<int64_t>(first + size, num_tokens);
    int32_t low = INT32_MAX;
    for (int64_t t = first; t < last; ++t) {
      const int32_t end = std::max(0, std::min(subtree_end[t], static_cast<int32_t>(num_tokens)));
      low = std::min(low, end);
      blocks.max_end[b] = std::max(blocks.max_end[b], end);
      blocks.min_pos[b] = std::min(blocks.min_pos[b], position[t]);
      blocks.max_pos[b] = std::max(blocks.max_pos[b], position[t]);
    }
    blocks.min_end[b] = last == first + size ? low : 0;
  }
  return blocks;
}

inline Tile classify(const Blocks& keys, int32_t key_block, const Blocks& rows, int32_t row_block, int32_t window) {
  const int64_t n0 = int64_t{key_block} * keys.size, n1 = n0 + keys.size;
  const int64_t r0 = int64_t{row_block} * rows.size, r1 = r0 + rows.size;
  if (r1 <= n0 || keys.max_end[key_block] <= r0) return Tile::kSkip;
  if (window > 0 && rows.min_pos[row_block] - keys.max_pos[key_block] >= window) return Tile::kSkip;
  const bool in_window = window == 0 || rows.max_pos[row_block] - keys.min_pos[key_block] < window;
  return r0 >= n1 - 1 && r1 <= keys.min_end[key_block] && in_window ? Tile::kFull : Tile::kPartial;
}

// The row blocks [first, last) that may meet a key block: those of rows [n0, max_end).
struct BlockRange {
  int32_t first, last;
};

inline BlockRange row_range(const Blocks& keys, int32_t key_block, const Blocks& rows) {
  const int64_t n0 = int64_t{key_block} * keys.size;
  const int64_t end = std::max<int64_t>(n0, keys.max_end[key_block]);
  return {static_cast<int32_t>(n0 / rows.size), static_cast<int32_t>((end + rows.size - 1) / rows.size)};
}

// For every row block the key blocks it meets, ascending (CSR). Time and memory grow with the number of entries.
struct VisibleLists {
  std::vector<int64_t> offsets;  // [row blocks + 1]
  std::vector<int32_t> indices;  // [offsets.back()]

  int64_t size(int64_t row_block) const { return offsets[row_block + 1] - offsets[row_block]; }
};

inline VisibleLists visible_lists(const Blocks& keys, const Blocks& rows, int32_t window) {
  VisibleLists lists;
  lists.offsets.assign(rows.count() + 1, 0);
  const auto each = [&](auto&& visit) {
    for (int32_t n = 0; n < keys.count(); ++n) {
      const BlockRange range = row_range(keys, n, rows);
      for (int32_t r = range.first; r < range.last; ++r)
        if (classify(keys, n, rows, r, window) != Tile::kSkip) visit(n, r);
    }
  };
  each([&](int32_t, int32_t r) { ++lists.offsets[r + 1]; });
  for (int32_t r = 0; r < rows.count(); ++r) lists.offsets[r + 1] += lists.offsets[r];
  lists.indices.resize(lists.offsets.back());
  std::vector<int64_t> next(lists.offsets.begin(), lists.offsets.end() - 1);
  each([&](int32_t n, int32_t r) { lists.indices[next[r]++] = n; });
  return lists;
}

}  // namespace treegrpo
