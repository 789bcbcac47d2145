// dK and dV for Hopper, and on request dQ with them: a producer thread and two consumer warpgroups.
//
//   dv_j = sum_i p_ij dout_i     dk_j = scale * sum_i ds_ij q_i     p, dp, ds as in backward_dq.h, i over rows and query heads
//
// A program is a tile of 128 keys of one key/value head, or a part of its query range, the longest first. The rows that see a
// key tile are one range, so nothing is looked up. Scores are held transposed, [keys, queries], as operands of the next product.
// Sums run in a fixed order: the same inputs give the same bits.
//
// With kAddQueryGrad every query tile's part of dQ is computed here too, five products a tile instead of seven in two passes, and
// added to float32 sums in global memory in the order in which programs come to it: not repeatable to the bit, and on an H200
// slower than two passes (NOTES.md).
#pragma once

#include "multiply.h"

namespace treegrpo::sm90 {

template <class Map>
struct KeyGradParams {
  Map q, dout;       // [T, Hq * D] in boxes [64, 64]
  Map k, v, dk, dv;  // [T, Hkv * D] in boxes [64, 64]
  KeyItems keys;     // tiles of 128 keys, 64 queries
  const int32_t *span, *half_min_end, *half_max_end;  // [Tp]; per 64 keys
  const float *lse2, *delta;                          // [Hq, Tp]
  float *partial_dk, *partial_dv;                     // [slots, Hkv, 128, D]
  float* dq_sums;  // kAddQueryGrad: [Hq, query tiles, D / 64, 64 * 64], zero at first, in the order of add_query_grad
  Sizes sizes;
  float scale, qk_scale;
};

template <int D, bool kAddQueryGrad>
struct KeyGradMemory {
  using Tile = KeyGradTile<D>;
  static constexpr int kKeyPanel = panel_bytes(Tile::kKeys), kQueryPanel = panel_bytes(Tile::kRows);
  static constexpr int kKeyBytes = tile_bytes(Tile::kKeys, D), kQueryBytes = tile_bytes(Tile::kRows, D);
  static constexpr int kRowBytes = Tile::kRows * 4;
  static constexpr int kK = 0, kV = kK + kKeyBytes, kQ = kV + kKeyBytes, kDout = kQ + Tile::kStages * kQueryBytes;
  // score gradients [128 keys, 64 queries], twice, so that one barrier a tile is enough; and dQ on its way out
  static constexpr int kSlopes = kDout + Tile::kStages * kQueryBytes, kSlopeBytes = panel_bytes(Tile::kKeys);
  static constexpr int kStaging = kSlopes + (kAddQueryGrad ? 2 * kSlopeBytes : 0), kStagingBytes = Tile::kRows * 64 * 4;
  static constexpr int kLse = kStaging + (kAddQueryGrad ? kConsumers * kStagingBytes : 0);
  static constexpr int kDelta = kLse + Tile::kStages * kRowBytes, kWhich = kDelta + Tile::kStages * kRowBytes;
  static constexpr int kKeysFull = kWhich + 8 * Tile::kStages;
  static constexpr int kFull = kKeysFull + 8, kFree = kFull + 8 * Tile::kStages, kBytes = kFree + 8 * Tile::kStages;
};

template <class Machine, int D, Half type, bool kAddQueryGrad>
struct KeyGrad {
  using Params = KeyGradParams<typename Machine::Map>;
  using Memory = KeyGradMemory<D, kAddQueryGrad>;
  using Sizing = KeyGradTile<D>;
  static constexpr int kRows = Sizing::kRows, kKeys = Sizing::kKeys, kStages = Sizing::kStages;

  static TREEGRPO_DEVICE void run(Machine& m, const Params& p) {
    const uint32_t base = m.shared();
    if (m.warpgroup() == 0 && m.thread() == 0) {
      m.init_barrier(base + Memory::kKeysFull, 1);
      for (int i = 0; i < kStages; ++i) {
        m.init_barrier(base + Memory::kFull + 8 * i, 1);
        m.init_barrier(base + Memory::kFree + 8 * i, kConsumers * kWarpsPerGroup);
      }
      m.publish_barriers();
    }
    m.sync_block();
    if (m.warpgroup() == 0) {
      m.template give_registers<24>();
      if (m.thread() == 0) produce(m, p, base);
    } else {
      m.template take_registers<240>();
      Consumer(m, p, base, m.warpgroup() - 1).run();
    }
  }

  static TREEGRPO_DEVICE int head_of(Machine& m, const Params& p) { return m.block() % p.sizes.num_kv_heads; }
  static TREEGRPO_DEVICE KeyWork work_of(Machine& m, const Params& p) {
    return KeyWork::of<kRows, kKeys>(p.keys, m.block() / p.sizes.num_kv_heads, p.sizes.num_tokens);
  }

  // Streams the keys, the values and the query tiles that see them, in the order in which the consumers read.
  static TREEGRPO_DEVICE void produce(Machine& m, const Params& p, uint32_t base) {
    const KeyWork work = work_of(m, p);
    const int kv_head = head_of(m, p);
    m.expect(base + Memory::kKeysFull, 2 * Memory::kKeyBytes);
    for (int half = 0; half < kConsumers; ++half) {
      const int row = work.tile * kKeys + half * kConsumerRows, at = half * panel_bytes(kConsumerRows);
      load<D>(m, p.k, base + Memory::kK + at, Memory::kKeyPanel, row, kv_head * D, base + Memory::kKeysFull);
      load<D>(m, p.v, base + Memory::kV + at, Memory::kKeyPanel, row, kv_head * D, base + Memory::kKeysFull);
    }
    Place ring;
    const int first = kv_head * p.sizes.group(), last = first + p.sizes.group();
    for (int head = first; head < last; ++head)
      for (int turn = 0; turn < work.num_full(); ++turn) fill(m, p, base, ring, work.full(turn), head);
    for (int head = first; head < last; ++head)
      for (int turn = 0; turn < work.num_partial(); ++turn) fill(m, p, base, ring, work.partial(turn), head);
  }

  static TREEGRPO_DEVICE void fill(Machine& m, const Params& p, uint32_t base, Place& ring, int query_tile, int head) {
    const uint32_t full = base + Memory::kFull + 8 * ring.slot;
    const int row = query_tile * kRows;
    const int64_t at = int64_t{head} * p.sizes.num_padded + row;
    m.wait(base + Memory::kFree + 8 * ring.slot, ring.phase ^ 1);
    // consumers are told which tile it is, for registers are scarce there
    m.store_shared(base + Memory::kWhich + 8 * ring.slot, row);
    m.store_shared(base + Memory::kWhich + 8 * ring.slot + 4, head);
    m.expect(full, 2 * Memory::kQueryBytes + 2 * Memory::kRowBytes);
    load<D>(m, p.q, base + Memory::kQ + ring.slot * Memory::kQueryBytes, Memory::kQueryPanel, row, head * D, full);
    load<D>(m, p.dout, base + Memory::kDout + ring.slot * Memory::kQueryBytes, Memory::kQueryPanel, row, head * D, full);
    m.load_bytes(p.lse2 + at, base + Memory::kLse + ring.slot * Memory::kRowBytes, Memory::kRowBytes, full);
    m.load_bytes(p.delta + at, base + Memory::kDelta + ring.slot * Memory::kRowBytes, Memory::kRowBytes, full);
    ring.template advance<kStages>();
  }

  // 64 keys of the tile.
  struct Consumer {
    Machine& m;
    const Params& p;
    uint32_t base;
    int consumer;

    Place ring{};
    int first_key = 0, spans[2] = {};  // this thread's: it holds two keys, eight apart
    float sum_k[D / 2], sum_v[D / 2];

    static constexpr int kBoth = 1, kOwn = 2;  // named barriers: of both consumers, of each

    TREEGRPO_DEVICE Consumer(Machine& m, const Params& p, uint32_t base, int consumer) : m(m), p(p), base(base), consumer(consumer) {}

    TREEGRPO_DEVICE void run() {
      TREEGRPO_UNROLL
      for (int i = 0; i < D / 2; ++i) sum_k[i] = sum_v[i] = 0;
      m.wait(base + Memory::kKeysFull, 0);
      full_tiles();
      // parities begin anew: the score gradients of the last tile have been read
      if (kAddQueryGrad) m.sync_named(kBoth, kConsumers * kWarpgroup);
      partial_tiles();
      write();
    }

    // Each of the three looks the work up anew, for registers would have to carry it through the loops.
    TREEGRPO_DEVICE void full_tiles() {
      for (int left = work_of(m, p).num_full() * p.sizes.group(); left > 0; --left) step<false>(left % 2);
    }

    TREEGRPO_DEVICE void partial_tiles() {
      const KeyWork work = work_of(m, p);
      const int key = work.tile * kKeys + consumer * kConsumerRows, half = work.tile * kConsumers + consumer;
      first_key = key + row_of(m.thread(), 0);
      TREEGRPO_UNROLL
      for (int r = 0; r < 2; ++r) spans[r] = m.read(p.span + first_key + 8 * r);
      const int min_end = m.read(p.half_min_end + half), max_end = m.read(p.half_max_end + half);
      for (int left = work.num_partial() * p.sizes.group(); left > 0; --left) {
        // dQ needs the score gradients of both consumers, zeros too
        if (kAddQueryGrad) {
          step<true>(left % 2);
          continue;
        }
        m.wait(base + Memory::kFull + 8 * ring.slot, ring.phase);
        if (classify(which().row, kRows, key, kConsumerRows, min_end, max_end) == Tile::kSkip) skip();
        else step<true>(0);
      }
    }

    struct Which {
      int row, head;
    };
    // The first row and the head of the query tile in the ring's slot.
    TREEGRPO_DEVICE Which which() {
      Which found;
      m.load_shared(base + Memory::kWhich + 8 * ring.slot, found.row, found.head);
      return found;
    }

    // A query tile that only the other consumer's keys are seen by.
    TREEGRPO_DEVICE void skip() {
      // no product keeps the lanes together: one may still have to read which tile it is
      m.sync_warp();
      release(m, base + Memory::kFree + 8 * ring.slot);
      ring.template advance<kStages>();
    }

    template <bool kMasked>
    TREEGRPO_DEVICE void step(int parity) {
      float scores[kRows / 2], slopes[kRows / 2];
      uint32_t operand[kRows / kDepth][4], slope_operand[kRows / kDepth][4];
      const uint32_t q = base + Memory::kQ + ring.slot * Memory::kQueryBytes;
      const uint32_t dout = base + Memory::kDout + ring.slot * Memory::kQueryBytes;
      const uint32_t own = consumer * panel_bytes(kConsumerRows);
      m.wait(base + Memory::kFull + 8 * ring.slot, ring.phase);
      const int query_row = kMasked ? which().row : 0;
      m.begin_products();
      multiply<type, kRows, D, Major::kSummed, Major::kSummed>(m, scores, base + Memory::kK + own, Memory::kKeyPanel, q,
                                                               Memory::kQueryPanel, false);
      m.end_products();
      multiply<type, kRows, D, Major::kSummed, Major::kSummed>(m, slopes, base + Memory::kV + own, Memory::kKeyPanel, dout,
                                                               Memory::kQueryPanel, false);
      m.end_products();
      float row[kRows / 4];
      read_row(row, base + Memory::kLse);
      m.template wait_products<1>(scores);
      TREEGRPO_UNROLL
      for (int i = 0; i < kRows / 2; ++i) {
        scores[i] = m.exp2(fmaf(scores[i], p.qk_scale, -row[i / 4 * 2 + i % 2]));
        const int query = query_row + column_of(m.thread(), i);
        if (kMasked && !visible(query, first_key + i / 2 % 2 * 8, spans[i / 2 % 2])) scores[i] = 0;
      }
      pack<type, kRows>(m, scores, operand);
      m.begin_products();
      multiply<type, D, kRows>(m, sum_v, operand, dout, Memory::kQueryPanel);
      m.end_products();
      m.template wait_products<1>(slopes);
      // here, for above the wait sixteen registers would carry it
      read_row(row, base + Memory::kDelta);
      TREEGRPO_UNROLL
      for (int i = 0; i < kRows / 2; ++i) slopes[i] = scores[i] * (slopes[i] - row[i / 4 * 2 + i % 2]);
      pack<type, kRows>(m, slopes, slope_operand);
      m.begin_products();
      multiply<type, D, kRows>(m, sum_k, slope_operand, q, Memory::kQueryPanel);
      m.end_products();
      if constexpr (kAddQueryGrad) add_query_grad(slope_operand, parity);
      m.template wait_products<0>(sum_k);
      m.keep(sum_v);
      if constexpr (!kAddQueryGrad) release(m, base + Memory::kFree + 8 * ring.slot);
      ring.template advance<kStages>();
    }

    // The values of this thread's columns, two neighbours in each group of eight.
    TREEGRPO_DEVICE void read_row(float (&row)[kRows / 4], uint32_t rows) {
      TREEGRPO_UNROLL
      for (int i = 0; i < kRows / 4; i += 2)
        m.load_shared(rows + ring.slot * Memory::kRowBytes + 4 * column_of(m.thread(), 2 * i), row[i], row[i + 1]);
    }

    // dQ [64, D] += ds [64, 128 keys] k. Consumers share it by columns; at D 64, one panel, they take turns by `parity`, which
    // also tells which of the two buffers of score gradients is written.
    TREEGRPO_DEVICE void add_query_grad(const uint32_t (&slopes)[kRows / kDepth][4], int parity) {
      const uint32_t buffer = base + Memory::kSlopes + parity * Memory::kSlopeBytes;
      store<kRows>(m, slopes, buffer, 0, consumer * kConsumerRows);
      m.fence_async();
      m.sync_named(kBoth, kConsumers * kWarpgroup);
      const bool mine = D > kPanelColumns || parity == consumer;
      const int panel = D > kPanelColumns ? consumer : 0;
      float grad[kRows / 2];
      if (mine) {
        m.begin_products();
        multiply<type, kPanelColumns, kKeys, Major::kOuter, Major::kOuter>(
            m, grad, buffer, Memory::kKeyPanel, base + Memory::kK + panel * Memory::kKeyPanel, Memory::kKeyPanel, false);
        m.end_products();
        m.template wait_products<1>(sum_k);
        m.keep(sum_v);
      } else {
        m.template wait_products<0>(sum_k);
        m.keep(sum_v);
      }
      const Which tile = which();
      release(m, base + Memory::kFree + 8 * ring.slot);
      if (mine) {
        m.template wait_products<0>(grad);
        const uint32_t staging = base + Memory::kStaging + consumer * Memory::kStagingBytes;
        // what went out before has been read by now
        if (m.thread() == 0) m.template wait_stores<0>();
        m.sync_named(kOwn + consumer, kWarpgroup);
        TREEGRPO_UNROLL
        for (int i = 0; i < kRows / 2; i += 4)
          m.store_shared(staging + (i / 4 * kWarpgroup + m.thread()) * 16, grad[i], grad[i + 1], grad[i + 2], grad[i + 3]);
        m.fence_async();
        m.sync_named(kOwn + consumer, kWarpgroup);
        if (m.thread() == 0) {
          const int64_t num_tiles = p.sizes.num_padded / kRows, panels = D / kPanelColumns;
          const int64_t at = (tile.head * num_tiles + tile.row / kRows) * panels + panel;
          m.add_bytes(p.dq_sums + at * (kRows * kPanelColumns), staging, Memory::kStagingBytes);
          m.end_stores();
        }
      }
    }

    TREEGRPO_DEVICE void write() {
      const KeyWork work = work_of(m, p);
      const int kv_head = head_of(m, p), key = work.tile * kKeys + consumer * kConsumerRows;
      if (work.slot >= 0) {
        const int64_t at = ((int64_t{work.slot} * p.sizes.num_kv_heads + kv_head) * kKeys + consumer * kConsumerRows) * D;
        write_partial(sum_k, p.partial_dk + at);
        write_partial(sum_v, p.partial_dv + at);
        // shared memory is read by what leaves it until then
        if (kAddQueryGrad && m.thread() == 0) m.template wait_stores<0>();
        return;
      }
      TREEGRPO_UNROLL
      for (float& x : sum_k) x *= p.scale;
      // every product of this consumer has read its keys and values by now, and with kAddQueryGrad the other's too
      if (kAddQueryGrad) m.sync_named(kBoth, kConsumers * kWarpgroup);
      const int row = consumer * kConsumerRows;
      store<type, D>(m, sum_k, base + Memory::kK, Memory::kKeyPanel, row);
      store<type, D>(m, sum_v, base + Memory::kV, Memory::kKeyPanel, row);
      m.fence_async();
      m.sync_named(kOwn + consumer, kWarpgroup);
      if (m.thread() == 0) {
        store<D>(m, p.dk, base + Memory::kK + panel_bytes(row), Memory::kKeyPanel, key, kv_head * D);
        store<D>(m, p.dv, base + Memory::kV + panel_bytes(row), Memory::kKeyPanel, key, kv_head * D);
        m.end_stores();
        m.template wait_stores<0>();
      }
    }

    TREEGRPO_DEVICE void write_partial(const float (&x)[D / 2], float* to) {
      TREEGRPO_UNROLL
      for (int i = 0; i < D / 2; i += 2)
        m.write(to + row_of(m.thread(), i) * D + column_of(m.thread(), i), x[i], x[i + 1]);
    }
  };
};

}  // namespace treegrpo::sm90
