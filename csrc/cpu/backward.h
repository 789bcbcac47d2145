// Backward, five products per tile pair: one task per (key/value head, chunk of key tiles) walks the query tiles that see the
// chunk, for every query head of the group.
//
//   p_ij = 2^(x_ij - lse_i)          dp_ij = dout_i . v_j        delta_i = dout_i . out_i
//   ds_ij = p_ij (dp_ij - delta_i)   dv_j = sum_i p_ij dout_i    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i
//
// dK and dV belong to one task. dQ of a query tile is summed over the chunks that it sees, the last chunk first: a chunk
// waits until the one after it has added its share. Tasks are handed out in that same order, so whoever waits, waits for a
// task that is running. No atomics on data, and chunks depend on the shape alone: the bits do not depend on the number of
// threads.
// Included once per instruction set, inside that set's namespace.

constexpr int64_t kChunkBytes = int64_t{1} << 19;  // what a chunk keeps in the second-level cache: K, K^T, V^T, dK, dV
constexpr int64_t kEnoughTasks = 64;

template <typename S>
inline int64_t chunk_tiles(const Shape& shape) {
  const int64_t bytes = kTile * (3 * padded<S>(shape.head_dim) + 2 * padded<S>(shape.value_dim)) * sizeof(S);
  const int64_t for_cache = std::max<int64_t>(1, kChunkBytes / bytes);
  return std::max<int64_t>(1, std::min(for_cache, shape.num_kv_heads * shape.num_tokens / (kTile * kEnoughTasks)));
}

// The query tiles [first, last) that meet a chunk, and each one's turn: how many later chunks add to its dQ before.
struct Turns {
  std::vector<BlockRange> rows;     // [chunks]
  std::vector<int64_t> offsets;     // [chunks] into `turn`
  std::vector<int32_t> turn;        // -1: does not meet the chunk (window)
  std::vector<int32_t> num_chunks;  // [query tiles] chunks that meet the tile

  Turns(const Blocks& chunks, const Blocks& tiles, int64_t window)
      : rows(chunks.count()), offsets(chunks.count()), num_chunks(tiles.count(), 0) {
    for (int32_t c = chunks.count(); c-- > 0;) {
      rows[c] = row_range(chunks, c, tiles);
      rows[c].last = std::min(rows[c].last, tiles.count());
      offsets[c] = static_cast<int64_t>(turn.size());
      for (int32_t r = rows[c].first; r < rows[c].last; ++r)
        turn.push_back(classify(chunks, c, tiles, r, window) == Tile::kSkip ? -1 : num_chunks[r]++);
    }
  }
};

template <typename S>
struct BackwardScratch {
  Buffer<S> q{kTile * kStride<S>};     // [kTile][D]
  Buffer<S> dout{kTile * kStride<S>};  // [kTile][Dv]
  Buffer<S> dq{kTile * kStride<S>};    // [kTile][D]
  Buffer<S> p{kTile * kTile};          // [kTile queries][kTile keys]
  Buffer<S> ds{kTile * kTile};         // [kTile queries][kTile keys]
  Buffer<S> dk, dv;                    // [chunk][padded D], [chunk][padded Dv]

  BackwardScratch(int64_t chunk, int64_t wide, int64_t value_wide) : dk(chunk * wide), dv(chunk * value_wide) {}
};

// One register tile of p and ds. With a softcap ds carries the derivative of the cap.
template <typename S>
inline void gradient_block(const MaskArrays<S>& mask, const S* q, const S* keys_t, int64_t head_dim, const S* dout,
                           const S* values_t, int64_t value_dim, int64_t i0, int64_t j0, bool masked, S cap, const S* lse,
                           const S* delta, S* p, S* ds) {
  using V = Simd<S>;
  const bool plain = !masked && cap == 0;
  {
    Micro<S, 2> acc{};
    multiply<S, 2, kStride<S>, 1>(acc, q, keys_t, kPanel<S>, head_dim);
    if (plain) {
#pragma GCC unroll 12
      for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) V::store(p + m * kTile + n * V::kWidth, exp2<S>(acc[m][n] - lse[m]));
    } else {
#pragma GCC unroll 12
      for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) V::store(p + m * kTile + n * V::kWidth, acc[m][n]);
    }
  }
  if (!plain) {
    for (int m = 0; m < kMicroRows; ++m) {
      for (int64_t n = 0; n < kPanel<S>; n += V::kWidth) {
        typename V::Vec x = V::load(p + m * kTile + n);
        if (cap > 0) {
          const typename V::Vec t = tanh<S>(x);
          V::store(ds + m * kTile + n, S(1) - t * t);
          x = t * cap;
        }
        x = exp2<S>(x - lse[m]);
        if (masked) x = mask.visible(i0 + m, j0 + n) ? x : typename V::Vec{};
        V::store(p + m * kTile + n, x);
      }
    }
  }
  Micro<S, 2> acc{};
  multiply<S, 2, kStride<S>, 1>(acc, dout, values_t, kPanel<S>, value_dim);
#pragma GCC unroll 12
  for (int m = 0; m < kMicroRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      const int64_t at = m * kTile + n * V::kWidth;
      typename V::Vec x = V::load(p + at) * (acc[m][n] - delta[m]);
      if (cap > 0) x *= V::load(ds + at);
      V::store(ds + at, x);
    }
}

// One (query tile, key tile): p and ds, then their shares of dv, dk and dq. fetch(r) is called before each group of rows.
template <typename S, typename Fetch>
inline void gradient_tile(const MaskArrays<S>& mask, const BackwardScratch<S>& mine, const S* keys, const S* keys_t,
                          const S* values_t, const Shape& shape, int64_t m0, int64_t n0, S cap, const S* lse,
                          const S* delta, S* dk, S* dv, const Fetch& fetch) {
  const int64_t head_dim = shape.head_dim, wide = padded<S>(head_dim), value_wide = padded<S>(shape.value_dim);
  const S *q = mine.q.get(), *dout = mine.dout.get();
  S *p = mine.p.get(), *ds = mine.ds.get();
  for (int64_t r = 0; r < kTile; r += kMicroRows) {
    fetch(r);
    int64_t first = kTile, last = 0;
    for (int64_t n = 0; n < kTile; n += kPanel<S>) {
      const Tile tile =
          classify(mask.panels, (n0 + n) / kPanel<S>, mask.groups, (m0 + r) / kMicroRows, mask.window);
      S *block_p = p + r * kTile + n, *block_ds = ds + r * kTile + n;
      if (tile == Tile::kSkip) {
        for (int m = 0; m < kMicroRows; ++m) {
          std::fill(block_p + m * kTile, block_p + m * kTile + kPanel<S>, S(0));
          std::fill(block_ds + m * kTile, block_ds + m * kTile + kPanel<S>, S(0));
        }
        continue;
      }
      first = std::min(first, n);
      last = n + kPanel<S>;
      gradient_block<S>(mask, q + r * kStride<S>, keys_t + n * head_dim, head_dim, dout + r * kStride<S>,
                        values_t + n * shape.value_dim, shape.value_dim, m0 + r, n0 + n, tile == Tile::kPartial, cap,
                        lse + r, delta + r, block_p, block_ds);
    }
    if (first < last)
      accumulate<S, kTile, 1>(ds + r * kTile + first, keys + first * wide, wide, last - first,
                              mine.dq.get() + r * kStride<S>, kStride<S>, wide, nullptr);
  }
  for (int64_t n = 0; n < kTile; n += kMicroRows) {
    // only the rows that see one of these keys
    const int64_t end = mask.groups.max_end[(n0 + n) / kMicroRows];
    const int64_t first = std::max<int64_t>(0, n0 + n - m0), rows = std::min(kTile, end - m0) - first;
    if (rows <= 0) continue;
    accumulate<S, 1, kTile>(p + first * kTile + n, dout + first * kStride<S>, kStride<S>, rows, dv + n * value_wide,
                            value_wide, value_wide, nullptr);
    accumulate<S, 1, kTile>(ds + first * kTile + n, q + first * kStride<S>, kStride<S>, rows, dk + n * wide, wide, wide,
                            nullptr);
  }
}

// In kWidth partial sums, so that it can run in vectors.
template <typename S, typename In>
inline S dot(const In* a, const In* b, int64_t dim) {
  constexpr int kWidth = Simd<S>::kWidth;
  S sums[kWidth] = {};
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth)
    for (int n = 0; n < kWidth; ++n) sums[n] += widen(a[d + n]) * widen(b[d + n]);
  for (int n = 0; d + n < dim; ++n) sums[n] += widen(a[d + n]) * widen(b[d + n]);
  return sum_of<S>(Simd<S>::load(sums));
}

// Spins until the counter reaches `turn`, and gives the core away when that takes long.
inline void wait_for(const std::atomic<int32_t>& counter, int32_t turn) {
  for (int spins = 0; counter.load(std::memory_order_acquire) < turn; ++spins)
    if (spins > 128) std::this_thread::yield();
}

template <typename S, typename In>
void backward_typed(const BackwardParams& p) {
  const Shape& shape = p.shape;
  const int64_t num_tokens = shape.num_tokens, head_dim = shape.head_dim, value_dim = shape.value_dim;
  const int64_t num_heads = shape.num_heads, num_kv_heads = shape.num_kv_heads, group = num_heads / num_kv_heads;
  const int64_t wide = padded<S>(head_dim), value_wide = padded<S>(value_dim);
  const auto* dout = static_cast<const In*>(p.dout);
  const auto* q = static_cast<const In*>(p.q);
  const auto* k = static_cast<const In*>(p.k);
  const auto* v = static_cast<const In*>(p.v);
  const auto* out = static_cast<const In*>(p.out);
  const auto* lse = static_cast<const S*>(p.lse);
  auto* dq = static_cast<In*>(p.dq);
  auto* dk = static_cast<In*>(p.dk);
  auto* dv = static_cast<In*>(p.dv);
  const S factor = static_cast<S>(query_factor(p.score));
  const S cap = static_cast<S>(p.score.softcap > 0 ? p.score.softcap * kLog2e : 0);
  // dk is summed over the packed q, which carries `factor`
  const S dk_factor = static_cast<S>(p.score.softcap > 0 ? p.score.softcap : 1 / kLog2e);
  const S dq_factor = static_cast<S>(p.score.scale);
  const MaskArrays<S> mask(p.mask, num_tokens);
  const int64_t chunk = kTile * chunk_tiles<S>(shape), num_q_tiles = mask.tiles.count();
  const Blocks chunks = mask.blocks(p.mask, num_tokens, chunk);
  const Turns turns(chunks, mask.tiles, mask.window);
  const int64_t num_workers = std::max<int64_t>(1, p.num_workers);

  const Buffer<S> keys(num_kv_heads * mask.num_padded * wide);           // [Hkv][T][padded D]
  const Buffer<S> keys_t(num_kv_heads * mask.num_padded * head_dim);     // [Hkv][T / kPanel][D][kPanel]
  const Buffer<S> values_t(num_kv_heads * mask.num_padded * value_dim);  // [Hkv][T / kPanel][Dv][kPanel]
  const Buffer<S> sums(num_heads * mask.num_padded * wide);              // [Hq][T][padded D] dq so far
  const Buffer<S> delta(num_heads * mask.num_padded), lse2(num_heads * mask.num_padded);  // [Hq][T]
  std::vector<BackwardScratch<S>> scratch;
  for (int64_t i = 0; i < num_workers; ++i) scratch.emplace_back(chunk, wide, value_wide);

  // all heads of a block of tokens in one task: they lie side by side
  run_tasks(p.parallel, num_workers, mask.panels.count(), [&](int64_t task, int64_t worker) {
    const int64_t t0 = task * kPanel<S>, real = std::min(kPanel<S>, num_tokens - t0);
    S* rows = scratch[worker].q.get();
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      const int64_t from = t0 * num_kv_heads + h, to = h * mask.num_padded + t0;
      load_rows<S>(k + from * head_dim, num_kv_heads * head_dim, real, head_dim, S(1), rows, kStride<S>, wide, kPanel<S>);
      transpose_panel<S>(rows, kStride<S>, head_dim, keys_t.get() + to * head_dim);
      for (int64_t n = 0; n < kPanel<S>; ++n)
        std::copy(rows + n * kStride<S>, rows + n * kStride<S> + wide, keys.get() + (to + n) * wide);
      load_rows<S>(v + from * value_dim, num_kv_heads * value_dim, real, value_dim, S(1), rows, kStride<S>, value_dim,
                   kPanel<S>);
      transpose_panel<S>(rows, kStride<S>, value_dim, values_t.get() + to * value_dim);
    }
    for (int64_t t = t0; t < t0 + kPanel<S>; ++t) {
      for (int64_t h = 0; h < num_heads; ++h) {
        S sum = 0, high = S(-kNoMaximum);  // a row past the end has p = 0
        if (t < num_tokens) {
          sum = dot<S>(dout + (t * num_heads + h) * value_dim, out + (t * num_heads + h) * value_dim, value_dim);
          high = static_cast<S>(lse[t * num_heads + h] * kLog2e);
        }
        delta.get()[h * mask.num_padded + t] = sum;
        lse2.get()[h * mask.num_padded + t] = high;
      }
    }
  });

  std::vector<std::atomic<int32_t>> done(num_heads * num_q_tiles);
  for (auto& count : done) count.store(0, std::memory_order_relaxed);
  run_tasks(p.parallel, num_workers, num_kv_heads * chunks.count(), [&](int64_t task, int64_t worker) {
    const int32_t c = static_cast<int32_t>(chunks.count() - 1 - task / num_kv_heads);
    const int64_t kv_head = task % num_kv_heads, c0 = c * chunk, c1 = std::min(c0 + chunk, mask.num_padded);
    const BackwardScratch<S>& mine = scratch[worker];
    S *b_q = mine.q.get(), *b_dout = mine.dout.get(), *b_dq = mine.dq.get();
    std::fill(mine.dk.get(), mine.dk.get() + chunk * wide, S(0));
    std::fill(mine.dv.get(), mine.dv.get() + chunk * value_wide, S(0));
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      for (int32_t r = turns.rows[c].first; r < turns.rows[c].last; ++r) {
        const int32_t turn = turns.turn[turns.offsets[c] + r - turns.rows[c].first];
        if (turn < 0) continue;
        const int64_t m0 = int64_t{r} * kTile, real = std::min(kTile, num_tokens - m0);
        load_rows<S>(q + (m0 * num_heads + h) * head_dim, num_heads * head_dim, real, head_dim, factor, b_q, kStride<S>,
                     wide, kTile);
        load_rows<S>(dout + (m0 * num_heads + h) * value_dim, num_heads * value_dim, real, value_dim, S(1), b_dout,
                     kStride<S>, value_wide, kTile);
        for (int64_t i = 0; i < kTile; ++i) std::fill(b_dq + i * kStride<S>, b_dq + i * kStride<S> + wide, S(0));
        bool fetched = r + 1 == turns.rows[c].last;
        for (int64_t n0 = c0; n0 < c1; n0 += kTile) {
          if (classify(mask.tiles, n0 / kTile, mask.tiles, r, mask.window) == Tile::kSkip) continue;
          const int64_t at = kv_head * mask.num_padded + n0, row = h * mask.num_padded + m0;
          gradient_tile<S>(mask, mine, keys.get() + at * wide, keys_t.get() + at * head_dim,
                           values_t.get() + at * value_dim, shape, m0, n0, cap, lse2.get() + row, delta.get() + row,
                           mine.dk.get() + (n0 - c0) * wide, mine.dv.get() + (n0 - c0) * value_wide, [&](int64_t i) {
                             const int64_t next = m0 + kTile + i, rows = std::min<int64_t>(kMicroRows, num_tokens - next);
                             if (fetched) return;
                             fetch_rows(q + (next * num_heads + h) * head_dim, num_heads * head_dim * sizeof(In), rows,
                                        head_dim * sizeof(In));
                             fetch_rows(dout + (next * num_heads + h) * value_dim, num_heads * value_dim * sizeof(In), rows,
                                        value_dim * sizeof(In));
                             fetch_rows(sums.get() + (h * mask.num_padded + next) * wide, wide * sizeof(S), rows,
                                        wide * sizeof(S));
                           });
          fetched = true;
        }
        std::atomic<int32_t>& count = done[h * num_q_tiles + r];
        wait_for(count, turn);
        S* sum = sums.get() + (h * mask.num_padded + m0) * wide;
        for (int64_t i = 0; i < real; ++i) {
          S *row = b_dq + i * kStride<S>, *so_far = sum + i * wide;
          if (turn > 0)
            for (int64_t d = 0; d < wide; ++d) row[d] += so_far[d];
          if (turn + 1 < turns.num_chunks[r])
            std::copy(row, row + wide, so_far);
          else
            store_row<S>(row, head_dim, dq_factor, dq + ((m0 + i) * num_heads + h) * head_dim);
        }
        count.store(turn + 1, std::memory_order_release);
      }
    }
    for (int64_t t = c0; t < std::min(c1, num_tokens); ++t) {
      const int64_t at = t * num_kv_heads + kv_head;
      store_row<S>(mine.dk.get() + (t - c0) * wide, head_dim, dk_factor, dk + at * head_dim);
      store_row<S>(mine.dv.get() + (t - c0) * value_wide, value_dim, S(1), dv + at * value_dim);
    }
  });
}

void backward(const BackwardParams& p) {
  switch (p.type) {
    case Type::kFloat32: return backward_typed<float, float>(p);
    case Type::kFloat64: return backward_typed<double, double>(p);
    case Type::kBFloat16: return backward_typed<float, uint16_t>(p);
  }
}
