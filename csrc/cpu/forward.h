// Forward: one task per (query tile, head) walks the key steps it meets with an online softmax in base 2.
//
//   x_ij = log2(e) * s_ij      m_i = max_j x_ij      l_i = sum_j 2^(x_ij - m_i)  (+ 2^(log2(e) sink - m_i))
//   out_i = sum_j 2^(x_ij - m_i) v_j / l_i           lse_i = (m_i + log2 l_i) / log2(e)
//
// A step is cut into register tiles of kMicroRows queries by kPanel keys, each skipped, computed plain, or computed and
// masked.
// Included once per instruction set, inside that set's namespace.

// finite, so that a row that has seen nothing yet needs no special case
constexpr double kNoMaximum = -1e30;

template <typename S>
struct ForwardScratch {
  Buffer<S> q{kTile * kStride<S>};             // [kTile][D]
  Buffer<S> acc{kTile * kStride<S>};           // [kTile][Dv]
  Buffer<S> scores{kMicroRows * kStep};        // [kMicroRows][kStep]
  Buffer<S> row_max{kTile};                    // [kTile]
  Buffer<S> row_sum{kTile * Simd<S>::kWidth};  // [kTile][width] partial sums by lane
};

// One register tile of scores -> scores, and `high` raised to each row's maximum by lane.
template <typename S>
inline void score_block(const MaskArrays<S>& mask, const S* q, const S* keys_t, int64_t head_dim, int64_t i0, int64_t j0,
                        bool masked, S cap, S* scores, typename Simd<S>::Vec* high) {
  using V = Simd<S>;
  Micro<S, 2> acc{};
  multiply<S, 2, kStride<S>, 1>(acc, q, keys_t, kPanel<S>, head_dim);
  const bool plain = !masked && cap == 0;
#pragma GCC unroll 12
  for (int m = 0; m < kMicroRows; ++m) {
    V::store(scores + m * kStep, acc[m][0]);
    V::store(scores + m * kStep + V::kWidth, acc[m][1]);
    if (plain) high[m] = V::max(high[m], V::max(acc[m][0], acc[m][1]));
  }
  if (plain) return;
  for (int m = 0; m < kMicroRows; ++m) {
    for (int64_t n = 0; n < kPanel<S>; n += V::kWidth) {
      S* s = scores + m * kStep + n;
      typename V::Vec x = V::load(s);
      if (cap > 0) x = tanh<S>(x) * cap;
      if (masked) x = mask.visible(i0 + m, j0 + n) ? x : V::all(-std::numeric_limits<S>::infinity());
      V::store(s, x);
      high[m] = V::max(high[m], x);
    }
  }
}

// kMicroRows queries against one step of keys.
template <typename S>
inline void attend_step(const MaskArrays<S>& mask, const S* q, const S* keys_t, const S* values, int64_t head_dim,
                        int64_t value_wide, int64_t i0, int64_t j0, S cap, S* scores, S* acc, S* row_max, S* row_sum) {
  using V = Simd<S>;
  constexpr int kNumPanels = kStep / kPanel<S>, kRows = kMicroRows + 16 - kMicroRows % 16;
  int first[kNumPanels], last[kNumPanels], num_runs = 0;  // runs of visible panels
  typename V::Vec high[kMicroRows];
  for (auto& x : high) x = V::all(S(kNoMaximum));
  for (int n = 0; n < kNumPanels; ++n) {
    const int64_t j = j0 + n * kPanel<S>;
    const Tile tile = classify(mask.panels, j / kPanel<S>, mask.groups, i0 / kMicroRows, mask.window);
    if (tile == Tile::kSkip) continue;
    score_block<S>(mask, q, keys_t + n * head_dim * kPanel<S>, head_dim, i0, j, tile == Tile::kPartial, cap,
                   scores + n * kPanel<S>, high);
    if (num_runs == 0 || last[num_runs - 1] != n) first[num_runs++] = n;
    last[num_runs - 1] = n + 1;
  }
  if (num_runs == 0) return;

  S keep[kRows] = {};
  for (int m = 0; m < kMicroRows; ++m) {
    const S found = max_of<S, TREEGRPO_VECTOR_BYTES>(reinterpret_cast<const S*>(&high[m]));
    const S top = found > row_max[m] ? found : row_max[m];
    keep[m] = row_max[m] - top;
    row_max[m] = top;
  }
  for (int m = 0; m < kMicroRows; m += V::kWidth) V::store(keep + m, exp2<S>(V::load(keep + m)));
  for (int m = 0; m < kMicroRows; ++m) {
    S* s = scores + m * kStep;
    typename V::Vec sum0 = V::load(row_sum + m * V::kWidth) * keep[m], sum1{};
    for (int run = 0; run < num_runs; ++run) {
      for (int64_t n = first[run] * kPanel<S>; n < last[run] * kPanel<S>; n += kPanel<S>) {
        const typename V::Vec p0 = exp2<S>(V::load(s + n) - row_max[m]);
        const typename V::Vec p1 = exp2<S>(V::load(s + n + V::kWidth) - row_max[m]);
        V::store(s + n, p0);
        V::store(s + n + V::kWidth, p1);
        sum0 += p0;
        sum1 += p1;
      }
    }
    V::store(row_sum + m * V::kWidth, sum0 + sum1);
  }
  for (int run = 0; run < num_runs; ++run) {
    const int64_t n = first[run] * kPanel<S>, depth = last[run] * kPanel<S> - n;
    accumulate<S, kStep, 1>(scores + n, values + n * value_wide, value_wide, depth, acc, kStride<S>, value_wide,
                            run == 0 ? keep : nullptr);
  }
}

template <typename S, typename In>
void forward_typed(const ForwardParams& p) {
  using V = Simd<S>;
  const Shape& shape = p.shape;
  const int64_t num_tokens = shape.num_tokens, head_dim = shape.head_dim, value_dim = shape.value_dim;
  const int64_t num_heads = shape.num_heads, num_kv_heads = shape.num_kv_heads, group = num_heads / num_kv_heads;
  const int64_t value_wide = padded<S>(value_dim);
  const auto* q = static_cast<const In*>(p.q);
  const auto* k = static_cast<const In*>(p.k);
  const auto* v = static_cast<const In*>(p.v);
  auto* out = static_cast<In*>(p.out);
  auto* lse = static_cast<S*>(p.lse);
  const S factor = static_cast<S>(query_factor(p.score));
  const S cap = static_cast<S>(p.score.softcap > 0 ? p.score.softcap * kLog2e : 0);
  const MaskArrays<S> mask(p.mask, num_tokens);
  const Blocks steps = mask.blocks(p.mask, num_tokens, kStep);
  const VisibleLists lists = visible_lists(steps, mask.tiles, mask.window);
  const int64_t num_q_tiles = (num_tokens + kTile - 1) / kTile;
  const int64_t num_workers = std::max<int64_t>(1, p.num_workers);
  // longest first, so that no long task is left for the end
  std::vector<int32_t> order(num_q_tiles);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return lists.size(a) > lists.size(b); });

  const Buffer<S> keys_t(num_kv_heads * mask.num_padded * head_dim);    // [Hkv][T / kPanel][D][kPanel]
  const Buffer<S> values(num_kv_heads * mask.num_padded * value_wide);  // [Hkv][T][padded Dv]
  std::vector<ForwardScratch<S>> scratch(num_workers);
  // all heads of a block of tokens in one task: they lie side by side
  run_tasks(p.parallel, num_workers, mask.panels.count(), [&](int64_t task, int64_t worker) {
    const int64_t t = task * kPanel<S>, real = std::min(kPanel<S>, num_tokens - t);
    S* rows = scratch[worker].q.get();
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      const int64_t from = t * num_kv_heads + h, to = h * mask.num_padded + t;
      load_rows<S>(k + from * head_dim, num_kv_heads * head_dim, real, head_dim, S(1), rows, kStride<S>, head_dim,
                   kPanel<S>);
      transpose_panel<S>(rows, kStride<S>, head_dim, keys_t.get() + to * head_dim);
      load_rows<S>(v + from * value_dim, num_kv_heads * value_dim, real, value_dim, S(1), values.get() + to * value_wide,
                   value_wide, value_wide, kPanel<S>);
    }
  });

  run_tasks(p.parallel, num_workers, num_heads * num_q_tiles, [&](int64_t task, int64_t worker) {
    // a guess, for prefetching only
    const int64_t next_task = task + num_workers < num_heads * num_q_tiles ? task + num_workers : -1;
    const int64_t tile = order[task / num_heads], h = task % num_heads, kv_head = h / group;
    const int64_t m0 = tile * kTile, m1 = std::min(num_tokens, m0 + kTile);
    const ForwardScratch<S>& mine = scratch[worker];
    S *row_max = mine.row_max.get(), *row_sum = mine.row_sum.get(), *acc = mine.acc.get();
    load_rows<S>(q + (m0 * num_heads + h) * head_dim, num_heads * head_dim, m1 - m0, head_dim, factor, mine.q.get(),
                 kStride<S>, head_dim, kTile);
    const S sink = p.sinks ? static_cast<S>(p.sinks[h] * kLog2e) : S(kNoMaximum);
    const S start = std::max(sink, S(kNoMaximum));
    for (int64_t i = 0; i < kTile; ++i) {
      std::fill(acc + i * kStride<S>, acc + i * kStride<S> + value_wide, S(0));
      row_max[i] = start;
      V::store(row_sum + i * V::kWidth, typename V::Vec{});
      if (p.sinks) row_sum[i * V::kWidth] = std::exp2(sink - start);
    }
    for (int64_t e = lists.offsets[tile]; e < lists.offsets[tile + 1]; ++e) {
      const int64_t j0 = lists.indices[e] * kStep, at = kv_head * mask.num_padded + j0;
      for (int64_t r = 0; r < kTile; r += kMicroRows) {
        if (e == lists.offsets[tile] && next_task >= 0) {
          const int64_t next = order[next_task / num_heads] * kTile + r;
          fetch_rows(q + (next * num_heads + next_task % num_heads) * head_dim, num_heads * head_dim * sizeof(In),
                     std::min<int64_t>(kMicroRows, num_tokens - next), head_dim * sizeof(In));
        }
        attend_step<S>(mask, mine.q.get() + r * kStride<S>, keys_t.get() + at * head_dim, values.get() + at * value_wide,
                       head_dim, value_wide, m0 + r, j0, cap, mine.scores.get(), acc + r * kStride<S>, row_max + r,
                       row_sum + r * V::kWidth);
      }
    }
    for (int64_t i = m0; i < m1; ++i) {
      const int64_t r = i - m0;
      const S total = sum_of<S>(V::load(row_sum + r * V::kWidth));
      store_row<S>(acc + r * kStride<S>, value_dim, S(1) / total, out + (i * num_heads + h) * value_dim);
      lse[i * num_heads + h] = static_cast<S>((row_max[r] + std::log2(total)) / kLog2e);
    }
  });
}

void forward(const ForwardParams& p) {
  switch (p.type) {
    case Type::kFloat32: return forward_typed<float, float>(p);
    case Type::kFloat64: return forward_typed<double, double>(p);
    case Type::kBFloat16: return forward_typed<float, uint16_t>(p);
  }
}
