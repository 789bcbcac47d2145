// dQ for Hopper: a producer thread and two consumer warpgroups.
//
//   p_ij = exp(s_ij - lse_i)     dp_ij = dout_i . v_j     ds_ij = p_ij (dp_ij - delta_i)     delta_i = dout_i . out_i
//   dq_i = scale * sum_j ds_ij k_j
//
// The walk is the forward's. The product that adds a tile to dQ runs while the next tile's scores begin. Sums run in a fixed
// order: the same inputs give the same bits.
#pragma once

#include "walk.h"

namespace treegrpo::sm90 {

template <class Map>
struct QueryGradParams {
  Map q, dout, dq;  // [T, Hq * D] in boxes [64, 64]
  Map k, v;         // [T, Hkv * D] in boxes [64, 64]
  Lists lists;      // tiles of 128 queries, 64 keys
  const int32_t *span, *min_end, *max_end;  // as in the forward; per tile of 64 keys
  const float *lse2, *delta;                // [Hq, Tp]; lse2 = lse * log2(e)
  Sizes sizes;
  int num_items;
  float scale, qk_scale;
};

template <int D>
struct QueryGradMemory {
  using Tile = QueryGradTile<D>;
  static constexpr int kQueryPanel = panel_bytes(kConsumerRows), kKeyPanel = panel_bytes(Tile::kKeys);
  static constexpr int kQueryBytes = tile_bytes(kConsumerRows, D), kKeyBytes = tile_bytes(Tile::kKeys, D);
  static constexpr int kQ = 0, kDout = kQ + kConsumers * kQueryBytes;
  static constexpr int kK = kDout + kConsumers * kQueryBytes, kV = kK + Tile::kStages * kKeyBytes;
  static constexpr int kQFull = kV + Tile::kStages * kKeyBytes, kQFree = kQFull + 8 * kConsumers;
  static constexpr int kKFull = kQFree + 8 * kConsumers, kKFree = kKFull + 8 * Tile::kStages;
  static constexpr int kVFull = kKFree + 8 * Tile::kStages, kVFree = kVFull + 8 * Tile::kStages;
  static constexpr int kBytes = kVFree + 8 * Tile::kStages;
};

template <class Machine, int D, Half type>
struct QueryGrad {
  using Params = QueryGradParams<typename Machine::Map>;
  using Memory = QueryGradMemory<D>;
  using Sizing = QueryGradTile<D>;
  using Walker = Walk<Machine, D, Sizing, Memory, Params>;
  using KeyTile = typename Walker::KeyTile;
  static constexpr int kRows = Sizing::kRows, kKeys = Sizing::kKeys, kStages = Sizing::kStages;

  static TREEGRPO_DEVICE void run(Machine& m, const Params& p) {
    const uint32_t base = m.shared();
    Walker::init_barriers(m, base, kConsumers);
    if (m.warpgroup() == 0) {
      m.template give_registers<24>();
      if (m.thread() == 0) produce(m, p, base);
    } else {
      m.template take_registers<240>();
      Consumer(m, p, base, m.warpgroup() - 1).run();
    }
  }

  static TREEGRPO_DEVICE void produce(Machine& m, const Params& p, uint32_t base) {
    Place ring;
    const int rounds = num_rounds(p.num_items, m.block(), m.num_blocks());
    for (int round = 0; round < rounds; ++round) {
      const auto work = QueryWork::of(p.lists, item_of(round, m.block(), m.num_blocks()), p.sizes.num_heads);
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const int row = work.tile * kRows + consumer * kConsumerRows;
        const uint32_t full = base + Memory::kQFull + 8 * consumer;
        m.wait(base + Memory::kQFree + 8 * consumer, round % 2 ^ 1);
        m.expect(full, 2 * Memory::kQueryBytes);
        load<D>(m, p.q, base + Memory::kQ + consumer * Memory::kQueryBytes, Memory::kQueryPanel, row, work.head * D, full);
        load<D>(m, p.dout, base + Memory::kDout + consumer * Memory::kQueryBytes, Memory::kQueryPanel, row, work.head * D, full);
      }
      Walker::stream(m, p, base, work, ring);
    }
  }

  // 64 query rows of every work item of this program.
  struct Consumer {
    Machine& m;
    const Params& p;
    uint32_t base;
    int consumer;

    Place ring{};     // the key tile that comes next
    Place pending{};  // the one whose score gradients wait for its keys
    bool has_pending = false;
    int rows[2] = {};  // this thread's
    float lse2[2], delta[2];
    float scores[kKeys / 2], slopes[kKeys / 2], sum[D / 2];
    uint32_t operand[kKeys / kDepth][4];

    TREEGRPO_DEVICE Consumer(Machine& m, const Params& p, uint32_t base, int consumer) : m(m), p(p), base(base), consumer(consumer) {}

    TREEGRPO_DEVICE void run() {
      const int rounds = num_rounds(p.num_items, m.block(), m.num_blocks());
      for (int round = 0; round < rounds; ++round) {
        const auto work = QueryWork::of(p.lists, item_of(round, m.block(), m.num_blocks()), p.sizes.num_heads);
        begin(work);
        m.wait(base + Memory::kQFull + 8 * consumer, round % 2);
        int turn = 0;
        // the loop over full tiles wants something pending
        const int row = work.tile * kRows + consumer * kConsumerRows;
        // looked up one tile ahead, for the loads take their time
        KeyTile next = Walker::key_tile(p, work, 0);
        for (; turn < work.num_partial() || (turn < work.num_tiles && !has_pending); ++turn) {
          const KeyTile tile = next;
          next = Walker::key_tile(p, work, turn + 1 < work.num_tiles ? turn + 1 : turn);
          partial(row, tile);
        }
        for (; turn < work.num_tiles; ++turn) step<true>(false, 0);
        if (has_pending) finish();
        write(work);
      }
    }

    TREEGRPO_DEVICE uint32_t queries() const { return base + Memory::kQ + consumer * Memory::kQueryBytes; }

    TREEGRPO_DEVICE void begin(const QueryWork& work) {
      has_pending = false;
      TREEGRPO_UNROLL
      for (int r = 0; r < 2; ++r) {
        rows[r] = work.tile * kRows + consumer * kConsumerRows + row_of(m.thread(), 2 * r);
        const int64_t at = int64_t{work.head} * p.sizes.num_padded + rows[r];
        lse2[r] = m.read(p.lse2 + at), delta[r] = m.read(p.delta + at);
      }
      TREEGRPO_UNROLL
      for (float& x : sum) x = 0;
    }

    TREEGRPO_DEVICE void partial(int row, const KeyTile& tile) {
      const Tile seen = tile.seen_from(row);
      if (seen == Tile::kSkip) return skip();
      if (has_pending) step<true>(seen == Tile::kPartial, tile.key);
      else step<false>(seen == Tile::kPartial, tile.key);
    }

    // A key tile that only the other consumer needs.
    TREEGRPO_DEVICE void skip() {
      // the keys of the pending tile would keep the producer from filling the ring
      if (has_pending) finish();
      Walker::pass_on(m, base, ring);
    }

    // Score gradients of the next key tile; with kOverlap those of the pending one meet its keys meanwhile.
    template <bool kOverlap>
    TREEGRPO_DEVICE void step(bool masked, int key) {
      int spans[kKeys / 4];
      if (masked) read_spans<kKeys>(m, p.span + key, spans);
      const uint32_t k = base + Memory::kK + ring.slot * Memory::kKeyBytes, v = base + Memory::kV + ring.slot * Memory::kKeyBytes;
      m.wait(base + Memory::kKFull + 8 * ring.slot, ring.phase);
      m.begin_products();
      multiply<type, kKeys, D, Major::kSummed, Major::kSummed>(m, scores, queries(), Memory::kQueryPanel, k, Memory::kKeyPanel,
                                                               false);
      m.end_products();
      m.wait(base + Memory::kVFull + 8 * ring.slot, ring.phase);
      m.begin_products();
      multiply<type, kKeys, D, Major::kSummed, Major::kSummed>(
          m, slopes, base + Memory::kDout + consumer * Memory::kQueryBytes, Memory::kQueryPanel, v, Memory::kKeyPanel, false);
      m.end_products();
      if (kOverlap) multiply_keys();
      m.template wait_products<kOverlap ? 2 : 1>(scores);
      TREEGRPO_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) scores[i] = m.exp2(fmaf(scores[i], p.qk_scale, -lse2[i / 2 % 2]));
      if (masked) mask(key, spans);
      m.template wait_products<kOverlap ? 1 : 0>(slopes);
      release(m, base + Memory::kVFree + 8 * ring.slot);
      TREEGRPO_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) scores[i] *= slopes[i] - delta[i / 2 % 2];
      if (kOverlap) {
        // passes at once; its branch keeps ptxas from moving the next wait above the arithmetic
        m.wait(base + Memory::kKFull + 8 * ring.slot, ring.phase);
        m.template wait_products<0>(sum);
        release(m, base + Memory::kKFree + 8 * pending.slot);
      }
      pack<type, kKeys>(m, scores, operand);
      pending = ring, has_pending = true;
      ring.template advance<kStages>();
    }

    TREEGRPO_DEVICE void multiply_keys() {
      m.begin_products();
      multiply<type, D, kKeys>(m, sum, operand, base + Memory::kK + pending.slot * Memory::kKeyBytes, Memory::kKeyPanel);
      m.end_products();
    }

    TREEGRPO_DEVICE void finish() {
      multiply_keys();
      m.template wait_products<0>(sum);
      release(m, base + Memory::kKFree + 8 * pending.slot);
      has_pending = false;
    }

    TREEGRPO_DEVICE void mask(int key, const int (&spans)[kKeys / 4]) {
      TREEGRPO_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) {
        const int j = key + column_of(m.thread(), i);
        if (!visible(rows[i / 2 % 2], j, spans[i / 4 * 2 + i % 2])) scores[i] = 0;
      }
    }

    TREEGRPO_DEVICE void write(const QueryWork& work) {
      TREEGRPO_UNROLL
      for (float& x : sum) x *= p.scale;
      // every product has read the queries by now: their buffer carries the result out
      store<type, D>(m, sum, queries(), Memory::kQueryPanel, 0);
      m.fence_async();
      m.sync_named(kWriting + consumer, kWarpgroup);
      if (m.thread() == 0) {
        store<D>(m, p.dq, queries(), Memory::kQueryPanel, work.tile * kRows + consumer * kConsumerRows, work.head * D);
        m.end_stores();
        m.template wait_stores<0>();
        m.arrive(base + Memory::kQFree + 8 * consumer);
      }
    }

    static constexpr int kWriting = 1;  // named barriers, one a consumer
  };
};

}  // namespace treegrpo::sm90
