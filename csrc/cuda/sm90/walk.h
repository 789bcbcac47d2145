// What the two kernels share that walk the key tiles of query tiles, forward and dQ: their barriers, the stream of keys and
// values, and what a consumer must know of a key tile.
#pragma once

#include "multiply.h"

namespace treegrpo::sm90 {

// Sizing has the tile's sizes, Memory the places of the rings and barriers, Params the lists.
template <class Machine, int D, class Sizing, class Memory, class Params>
struct Walk {
  static constexpr int kStages = Sizing::kStages;

  // `places` query buffers; both consumers read every key tile, and each warp of them says so by itself.
  static TREEGRPO_DEVICE void init_barriers(Machine& m, uint32_t base, int places) {
    if (m.warpgroup() == 0 && m.thread() == 0) {
      for (int i = 0; i < places; ++i) {
        m.init_barrier(base + Memory::kQFull + 8 * i, 1);
        m.init_barrier(base + Memory::kQFree + 8 * i, 1);
      }
      for (int i = 0; i < kStages; ++i) {
        m.init_barrier(base + Memory::kKFull + 8 * i, 1);
        m.init_barrier(base + Memory::kVFull + 8 * i, 1);
        m.init_barrier(base + Memory::kKFree + 8 * i, kConsumers * kWarpsPerGroup);
        m.init_barrier(base + Memory::kVFree + 8 * i, kConsumers * kWarpsPerGroup);
      }
      m.publish_barriers();
    }
    m.sync_block();
  }

  // Keys and values of one work item, in the order in which the consumers read them.
  static TREEGRPO_DEVICE void stream(Machine& m, const Params& p, uint32_t base, const QueryWork& work, Place& ring) {
    const int column = work.head / p.sizes.group() * D;
    for (int turn = 0; turn < work.num_tiles; ++turn, ring.template advance<kStages>()) {
      const int row = p.lists.indices[work.entry(turn)] * Sizing::kKeys;
      fill(m, p.k, base, Memory::kK, Memory::kKFull, Memory::kKFree, ring, row, column);
      fill(m, p.v, base, Memory::kV, Memory::kVFull, Memory::kVFree, ring, row, column);
    }
  }

  static TREEGRPO_DEVICE void fill(Machine& m, const typename Machine::Map& map, uint32_t base, int tiles, int full, int free,
                                   const Place& ring, int row, int column) {
    const uint32_t barrier = base + full + 8 * ring.slot;
    m.wait(base + free + 8 * ring.slot, ring.phase ^ 1);
    m.expect(barrier, Memory::kKeyBytes);
    load<D>(m, map, base + tiles + ring.slot * Memory::kKeyBytes, Memory::kKeyPanel, row, column, barrier);
  }

  // A key tile that this consumer has no use for is handed on, when every lane has seen that its phase has begun: no product keeps
  // the lanes together here, and one that comes late would take the next phase but one for its own.
  static TREEGRPO_DEVICE void pass_on(Machine& m, uint32_t base, Place& ring) {
    m.wait(base + Memory::kKFull + 8 * ring.slot, ring.phase);
    m.wait(base + Memory::kVFull + 8 * ring.slot, ring.phase);
    m.sync_warp();
    release(m, base + Memory::kKFree + 8 * ring.slot);
    release(m, base + Memory::kVFree + 8 * ring.slot);
    ring.template advance<kStages>();
  }

  struct KeyTile {
    int key, min_end, max_end;

    // What 64 query rows from `row` on see of it.
    TREEGRPO_DEVICE Tile seen_from(int row) const {
      return classify(row, kConsumerRows, key, Sizing::kKeys, min_end, max_end);
    }
  };
  static TREEGRPO_DEVICE KeyTile key_tile(const Params& p, const QueryWork& work, int turn) {
    const int tile = p.lists.indices[work.entry(turn)];
    return {tile * Sizing::kKeys, p.min_end[tile], p.max_end[tile]};
  }
};

}  // namespace treegrpo::sm90
