// Forward for Hopper: a producer thread and two consumer warpgroups.
//
//   s_ij = q_i . k_j * scale      m_i = max_j s_ij      l_i = sum_j exp(s_ij - m_i) (+ exp(sink - m_i))
//   out_i = sum_j exp(s_ij - m_i) v_j / l_i             lse_i = m_i + log l_i
//
// The producer streams the key tiles of a query tile's list through a ring in shared memory by TMA. Each consumer owns 64 query
// rows, decides for them alone whether a partial tile is to be skipped, masked or taken whole, and keeps two products in flight:
// while the softmax of one key tile runs, the tensor cores multiply the last tile's probabilities with its values. The two take
// turns in issuing their products, so that one's softmax meets the other's products. Programs are persistent.
#pragma once

#include "walk.h"

namespace treegrpo::sm90 {

template <class Map>
struct ForwardParams {
  Map q, out;                               // [T, Hq * D] in boxes [64, 64]
  Map k, v;                                 // [T, Hkv * D] in boxes [128, 64]
  Lists lists;                              // tiles of 128 queries, 128 keys
  const int32_t *span, *min_end, *max_end;  // [Tp] subtree_end[j] - j, 0 past T; [key tiles] over a tile's subtree_end
  const float* sinks;                       // [Hq] or null
  float* lse;                               // [T, Hq]
  Sizes sizes;
  int num_items;
  float qk_scale;  // scale * log2(e)
};

template <int D>
struct ForwardMemory {
  using Tile = ForwardTile<D>;
  static constexpr int kQueryPanel = panel_bytes(kConsumerRows), kKeyPanel = panel_bytes(Tile::kKeys);
  static constexpr int kQueryBytes = tile_bytes(kConsumerRows, D), kKeyBytes = tile_bytes(Tile::kKeys, D);
  // two query buffers a consumer: the next item's queries arrive while this one's are in use, and its result leaves
  static constexpr int kPlaces = 2 * kConsumers;
  static constexpr int kQ = 0, kK = kQ + kPlaces * kQueryBytes, kV = kK + Tile::kStages * kKeyBytes;
  static constexpr int kBarriers = kV + Tile::kStages * kKeyBytes;
  static constexpr int kQFull = kBarriers, kQFree = kQFull + 8 * kPlaces;
  static constexpr int kKFull = kQFree + 8 * kPlaces, kKFree = kKFull + 8 * Tile::kStages;
  static constexpr int kVFull = kKFree + 8 * Tile::kStages, kVFree = kVFull + 8 * Tile::kStages;
  static constexpr int kBytes = kVFree + 8 * Tile::kStages;
};

template <class Machine, int D, Half type>
struct Forward {
  using Params = ForwardParams<typename Machine::Map>;
  using Memory = ForwardMemory<D>;
  using Sizing = ForwardTile<D>;
  using Walker = Walk<Machine, D, Sizing, Memory, Params>;
  using KeyTile = typename Walker::KeyTile;
  static constexpr int kRows = Sizing::kRows, kKeys = Sizing::kKeys, kStages = Sizing::kStages;

  static TREEGRPO_DEVICE void run(Machine& m, const Params& p) {
    const uint32_t base = m.shared();
    Walker::init_barriers(m, base, Memory::kPlaces);
    if (m.warpgroup() == 0) {
      m.template give_registers<24>();
      if (m.thread() == 0) produce(m, p, base);
    } else {
      m.template take_registers<240>();
      Consumer(m, p, base, m.warpgroup() - 1).run();
    }
  }

  // Fills the query buffers and the key and value rings, in the order in which the consumers read them.
  static TREEGRPO_DEVICE void produce(Machine& m, const Params& p, uint32_t base) {
    Place ring;
    const int rounds = num_rounds(p.num_items, m.block(), m.num_blocks());
    for (int round = 0; round < rounds; ++round) {
      const auto work = QueryWork::of(p.lists, item_of(round, m.block(), m.num_blocks()), p.sizes.num_heads);
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        const int place = round % 2 * kConsumers + consumer;
        const uint32_t full = base + Memory::kQFull + 8 * place;
        m.wait(base + Memory::kQFree + 8 * place, round / 2 % 2 ^ 1);
        m.expect(full, Memory::kQueryBytes);
        load<D>(m, p.q, base + Memory::kQ + place * Memory::kQueryBytes, Memory::kQueryPanel,
                work.tile * kRows + consumer * kConsumerRows, work.head * D, full);
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
    Place pending{};  // the one whose probabilities wait for their values
    bool has_pending = false;
    uint32_t queries = 0;
    int rows[2] = {};  // this thread's
    float row_max[2], row_sum[2];
    float scores[kKeys / 2], sum[D / 2];
    uint32_t probabilities[kKeys / kDepth][4];

    TREEGRPO_DEVICE Consumer(Machine& m, const Params& p, uint32_t base, int consumer) : m(m), p(p), base(base), consumer(consumer) {}

    TREEGRPO_DEVICE void run() {
      if (consumer == 1) m.arrive_named(kTurn, 2 * kWarpgroup);
      const int rounds = num_rounds(p.num_items, m.block(), m.num_blocks());
      for (int round = 0; round < rounds; ++round) {
        const auto work = QueryWork::of(p.lists, item_of(round, m.block(), m.num_blocks()), p.sizes.num_heads);
        const int place = round % 2 * kConsumers + consumer;
        begin(work, place);
        m.wait(base + Memory::kQFull + 8 * place, round / 2 % 2);
        int turn = 0;
        const int row = work.tile * kRows + consumer * kConsumerRows;
        // looked up one tile ahead, for the loads take their time
        KeyTile next = Walker::key_tile(p, work, 0);
        // the loop over full tiles wants something pending: rows past T see nothing, of a tile that is full for the others either
        for (; turn < work.num_partial() || (turn < work.num_tiles && !has_pending); ++turn) {
          const KeyTile tile = next;
          next = Walker::key_tile(p, work, turn + 1 < work.num_tiles ? turn + 1 : turn);
          partial(row, tile);
          if (turn == 0) hand_back(round);
        }
        for (; turn < work.num_tiles; ++turn) step<true>(false, 0);
        if (has_pending) finish();
        write(work);
      }
      if (m.thread() == 0) m.template wait_stores<0>();
      // whoever takes the last turn leaves one for nobody
      if (consumer == 0) m.sync_named(kTurn, 2 * kWarpgroup);
    }

    static constexpr int kTurn = 1, kWriting = 3;  // named barriers, one a consumer each

    TREEGRPO_DEVICE void begin(const QueryWork& work, int place) {
      queries = base + Memory::kQ + place * Memory::kQueryBytes;
      has_pending = false;
      TREEGRPO_UNROLL
      for (int r = 0; r < 2; ++r) {
        rows[r] = work.tile * kRows + consumer * kConsumerRows + row_of(m.thread(), 2 * r);
        row_max[r] = -INFINITY, row_sum[r] = 0;
      }
      TREEGRPO_UNROLL
      for (float& x : sum) x = 0;
    }

    // The other query buffer has sent its result away by now: the producer may fill it.
    TREEGRPO_DEVICE void hand_back(int round) {
      if (round > 0 && m.thread() == 0) {
        m.template wait_stores<0>();
        m.arrive(base + Memory::kQFree + 8 * ((round + 1) % 2 * kConsumers + consumer));
      }
    }

    TREEGRPO_DEVICE void partial(int row, const KeyTile& tile) {
      const Tile seen = tile.seen_from(row);
      if (seen == Tile::kSkip) return skip();
      if (has_pending) step<true>(seen == Tile::kPartial, tile.key);
      else step<false>(seen == Tile::kPartial, tile.key);
    }

    // A key tile that only the other consumer needs.
    TREEGRPO_DEVICE void skip() {
      // the values of the pending tile would keep the producer from filling the ring
      if (has_pending) finish();
      Walker::pass_on(m, base, ring);
      take_turn();
      pass_turn();
    }

    TREEGRPO_DEVICE void take_turn() { m.sync_named(kTurn + consumer, 2 * kWarpgroup); }
    TREEGRPO_DEVICE void pass_turn() { m.arrive_named(kTurn + (consumer ^ 1), 2 * kWarpgroup); }

    // Scores of the next key tile; with kOverlap the probabilities of the pending one meet their values meanwhile.
    template <bool kOverlap>
    TREEGRPO_DEVICE void step(bool masked, int key) {
      int spans[kKeys / 4];
      if (masked) read_spans<kKeys>(m, p.span + key, spans);
      m.wait(base + Memory::kKFull + 8 * ring.slot, ring.phase);
      take_turn();
      m.begin_products();
      multiply<type, kKeys, D, Major::kSummed, Major::kSummed>(m, scores, queries, Memory::kQueryPanel,
                                                               base + Memory::kK + ring.slot * Memory::kKeyBytes,
                                                               Memory::kKeyPanel, false);
      m.end_products();
      if (kOverlap) multiply_values();
      pass_turn();
      m.template wait_products<kOverlap ? 1 : 0>(scores);
      release(m, base + Memory::kKFree + 8 * ring.slot);
      if (masked) mask(key, spans);
      float alpha[2];
      softmax(masked, alpha);
      if (kOverlap) {
        // passes at once; its branch keeps ptxas from moving the next wait above the softmax
        m.wait(base + Memory::kVFull + 8 * pending.slot, pending.phase);
        m.template wait_products<0>(sum);
        release(m, base + Memory::kVFree + 8 * pending.slot);
      }
      TREEGRPO_UNROLL
      for (int i = 0; i < D / 2; ++i) sum[i] *= alpha[i / 2 % 2];
      pack<type, kKeys>(m, scores, probabilities);
      pending = ring, has_pending = true;
      ring.template advance<kStages>();
    }

    TREEGRPO_DEVICE void multiply_values() {
      m.wait(base + Memory::kVFull + 8 * pending.slot, pending.phase);
      m.begin_products();
      multiply<type, D, kKeys>(m, sum, probabilities, base + Memory::kV + pending.slot * Memory::kKeyBytes, Memory::kKeyPanel);
      m.end_products();
    }

    TREEGRPO_DEVICE void finish() {
      multiply_values();
      m.template wait_products<0>(sum);
      release(m, base + Memory::kVFree + 8 * pending.slot);
      has_pending = false;
    }

    TREEGRPO_DEVICE void mask(int key, const int (&spans)[kKeys / 4]) {
      TREEGRPO_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) {
        const int j = key + column_of(m.thread(), i);
        if (!visible(rows[i / 2 % 2], j, spans[i / 4 * 2 + i % 2])) scores[i] = -INFINITY;
      }
    }

    // One online-softmax step in base 2: scores become probabilities, `alpha` what the sums so far are multiplied by.
    TREEGRPO_DEVICE void softmax(bool masked, float (&alpha)[2]) {
      float shift[2];
      TREEGRPO_UNROLL
      for (int r = 0; r < 2; ++r) {
        float top = -INFINITY;
        TREEGRPO_UNROLL
        for (int i = 2 * r; i < kKeys / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
        top = fmaxf(row_max[r], m.quad_max(top) * p.qk_scale);
        // a row may have met no visible key yet: subtract 0 rather than -inf
        shift[r] = masked && top == -INFINITY ? 0 : top;
        alpha[r] = m.exp2(row_max[r] - shift[r]);
        row_max[r] = top, row_sum[r] *= alpha[r];
      }
      TREEGRPO_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) {
        scores[i] = m.exp2(fmaf(scores[i], p.qk_scale, -shift[i / 2 % 2]));
        row_sum[i / 2 % 2] += scores[i];
      }
    }

    TREEGRPO_DEVICE void write(const QueryWork& work) {
      TREEGRPO_UNROLL
      for (int r = 0; r < 2; ++r) {
        float total = m.quad_sum(row_sum[r]), alpha = 1;
        if (p.sinks) {
          const float sink = p.sinks[work.head] * 1.4426950408889634f, top = fmaxf(row_max[r], sink);
          alpha = m.exp2(row_max[r] - top);
          total = total * alpha + m.exp2(sink - top);
          row_max[r] = top;
        }
        // rows past T met no key
        const float safe = total == 0 ? 1 : total;
        if (m.thread() % 4 == 0 && rows[r] < p.sizes.num_tokens)
          p.lse[int64_t{rows[r]} * p.sizes.num_heads + work.head] = (row_max[r] + m.log2(safe)) * 0.6931471805599453f;
        row_sum[r] = alpha / safe;
      }
      TREEGRPO_UNROLL
      for (int i = 0; i < D / 2; ++i) sum[i] *= row_sum[i / 2 % 2];
      // every product has read the queries by now: their buffer carries the result out
      store<type, D>(m, sum, queries, Memory::kQueryPanel, 0);
      m.fence_async();
      m.sync_named(kWriting + consumer, kWarpgroup);
      if (m.thread() == 0) {
        store<D>(m, p.out, queries, Memory::kQueryPanel, work.tile * kRows + consumer * kConsumerRows, work.head * D);
        m.end_stores();
      }
    }
  };
};

}  // namespace treegrpo::sm90
