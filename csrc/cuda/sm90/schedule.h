// Who computes what, in which order: pure integer arithmetic that the kernels and the unit tests share.
//
// Queries walk lists (TreePlan.tile_lists): for each query tile the key tiles it sees, full ones first, then partial ones. Partial
// tiles are taken first, so that the loop over full ones, most of the work, need not ask.
// Keys need no list: the query rows that see a key tile are one range.
#pragma once

#include <cstdint>

#include "../../tiles.h"
#include "../host_device.h"

namespace treegrpo::sm90 {

// Key j is visible to query i iff j <= i < j + span, span = subtree_end[j] - j: one unsigned comparison.
TREEGRPO_HD bool visible(int query, int key, int span) {
  return static_cast<uint32_t>(query - key) < static_cast<uint32_t>(span);
}

// What query rows [row, row + rows) see of keys [key, key + keys), whose subtree ends lie within [min_end, max_end].
TREEGRPO_HD Tile classify(int row, int rows, int key, int keys, int min_end, int max_end) {
  if (row + rows <= key || max_end <= row) return Tile::kSkip;
  return row >= key + keys - 1 && row + rows <= min_end ? Tile::kFull : Tile::kPartial;
}

// Work item `round` of a program. Items lie longest first; every other round is dealt in reverse, so that whoever got the
// longest of one round gets the shortest of the next.
TREEGRPO_HD int item_of(int round, int program, int num_programs) {
  return round * num_programs + (round % 2 ? num_programs - 1 - program : program);
}
TREEGRPO_HD int num_rounds(int num_items, int program, int num_programs) {
  const int whole = num_items / num_programs;
  return whole + (item_of(whole, program, num_programs) < num_items);
}

// The key tiles of each query tile (CSR), and the query tiles, longest list first.
struct Lists {
  const int32_t* offsets;  // [query tiles + 1]
  const int32_t* indices;  // [offsets[last]] of a query tile first the full key tiles, then the partial ones
  const int32_t* full;     // [query tiles] how many are full
  const int32_t* order;    // [query tiles]
};

// One query tile of one head, and its part of the lists.
struct QueryWork {
  int tile, head, first, num_full, num_tiles;

  static TREEGRPO_HD QueryWork of(const Lists& lists, int item, int num_heads) {
    const int tile = lists.order[item / num_heads], first = lists.offsets[tile];
    return {tile, item % num_heads, first, lists.full[tile], lists.offsets[tile + 1] - first};
  }
  TREEGRPO_HD int num_partial() const { return num_tiles - num_full; }
  // Place in the lists of the tile that comes `turn`-th.
  TREEGRPO_HD int entry(int turn) const { return first + (turn < num_partial() ? num_full + turn : turn - num_partial()); }
};

// Key tiles, or parts of their query ranges where those are long (treegrpo_kernels.work), longest first.
struct KeyItems {
  const int32_t* items;    // [items, 4]: key tile, first query tile, query tile past the last, slot of its partial or -1
  const int32_t* max_end;  // [key tiles]
  const int32_t* min_end;  // [key tiles] 0 where the tile reaches past T
};

// The query tiles of one item: [lo, a) and [b, hi) partial, [a, b) full.
struct KeyWork {
  int tile, lo, a, b, hi, slot;

  template <int kRows, int kKeys>
  static TREEGRPO_HD KeyWork of(const KeyItems& keys, int item, int num_tokens) {
    const int32_t* at = keys.items + item * 4;
    const int tile = at[0], n0 = tile * kKeys, n1 = n0 + kKeys < num_tokens ? n0 + kKeys : num_tokens;
    const auto clamp = [](int x, int low, int high) { return x < low ? low : x > high ? high : x; };
    const int end = (keys.max_end[tile] + kRows - 1) / kRows;
    const int lo = at[1] > n0 / kRows ? at[1] : n0 / kRows, hi = clamp(at[2], lo, end > lo ? end : lo);
    const int a = clamp((n1 - 1 + kRows - 1) / kRows, lo, hi), b = clamp(keys.min_end[tile] / kRows, a, hi);
    return {tile, lo, a, b, hi, at[3]};
  }
  TREEGRPO_HD int num_full() const { return b - a; }
  TREEGRPO_HD int num_partial() const { return (a - lo) + (hi - b); }
  // The query tile that comes `turn`-th among the full or the partial ones.
  TREEGRPO_HD int full(int turn) const { return a + turn; }
  TREEGRPO_HD int partial(int turn) const { return turn < a - lo ? lo + turn : b + turn - (a - lo); }
};

// A place in a ring of buffers, and the parity of the barrier phase that belongs to it.
struct Place {
  int slot = 0, phase = 0;

  template <int kStages>
  TREEGRPO_HD void advance() {
    if (++slot == kStages) slot = 0, phase ^= 1;
  }
};

}  // namespace treegrpo::sm90
