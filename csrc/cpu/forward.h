// Forward: one task per (query tile, head) walks the visible key tiles with an online softmax in base 2.
//
//   x_ij = log2(e) * s_ij      m_i = max_j x_ij      l_i = sum_j 2^(x_ij - m_i)  (+ 2^(log2(e) sink - m_i))
//   out_i = sum_j 2^(x_ij - m_i) v_j / l_i           lse_i = (m_i + log2 l_i) / log2(e)
//
// Included once per instruction set, inside that set's namespace.

constexpr double kLog2e = 1.4426950408889634074;

// What is multiplied into q while packing: with a softcap the argument of tanh, else the score in base 2.
inline double query_factor(const Score& score) {
  return score.softcap > 0 ? score.scale / score.softcap : score.scale * kLog2e;
}

// Scores of one region -> probabilities in place, running maximum and sum updated, `acc` rescaled where the maximum rose.
template <typename S, bool FULL>
inline void softmax_region(const MaskArrays& mask, const Region& r, int64_t m0, int64_t window, S cap, S* scores, S* acc,
                           int64_t acc_wide, S* row_max, S* row_sum) {
  using V = Simd<S>;
  constexpr S kNone = -std::numeric_limits<S>::infinity();
  const int64_t cols = r.key1 - r.key0;
  for (int64_t i = r.row0; i < r.row1; ++i) {
    S* s = scores + (i - m0) * kBlockN;
    typename V::Vec high = V::all(kNone);
    for (int64_t n = 0; n < cols; n += V::kWidth) {
      typename V::Vec x = V::load(s + n);
      if (cap > 0) x = tanh<S>(x) * cap;
      if constexpr (!FULL) x = visible<S>(mask, window, i, r.key0 + n) ? x : V::all(kNone);
      V::store(s + n, x);
      high = V::max(high, x);
    }
    const S old_max = row_max[i - m0];
    const S new_max = std::max(old_max, V::max_of(high));
    if (new_max == kNone) {
      // nothing visible so far: the probabilities of this region are zero
      for (int64_t n = 0; n < cols; n += V::kWidth) V::store(s + n, typename V::Vec{});
      continue;
    }
    typename V::Vec sum{};
    for (int64_t n = 0; n < cols; n += V::kWidth) {
      const typename V::Vec p = exp2<S>(V::load(s + n) - new_max);
      V::store(s + n, p);
      sum += p;
    }
    S& total = row_sum[i - m0];
    if (new_max > old_max) {
      const S keep = std::exp2(old_max - new_max);
      total *= keep;
      S* a = acc + (i - m0) * acc_wide;
      for (int64_t d = 0; d < acc_wide; d += V::kWidth) V::store(a + d, V::load(a + d) * keep);
      row_max[i - m0] = new_max;
    }
    total += V::sum_of(sum);
  }
}

template <typename S, typename In>
void forward_typed(const ForwardParams& p) {
  const Shape& shape = p.shape;
  const int64_t num_tokens = shape.num_tokens, head_dim = shape.head_dim, value_dim = shape.value_dim;
  const int64_t num_heads = shape.num_heads, num_kv_heads = shape.num_kv_heads, group = num_heads / num_kv_heads;
  const int64_t num_q_tiles = (num_tokens + kBlockM - 1) / kBlockM;
  const int64_t wide = padded<S>(head_dim), value_wide = padded<S>(value_dim);
  const auto* q = static_cast<const In*>(p.q);
  const auto* k = static_cast<const In*>(p.k);
  const auto* v = static_cast<const In*>(p.v);
  auto* out = static_cast<In*>(p.out);
  auto* lse = static_cast<S*>(p.lse);
  const S factor = static_cast<S>(query_factor(p.score));
  const S cap = static_cast<S>(p.score.softcap > 0 ? p.score.softcap * kLog2e : 0);
  const MaskArrays mask(p.mask, num_tokens);
  const int64_t num_kv_tiles = static_cast<int64_t>(mask.tiles.end_max.size());

  const Packed<S> keys(num_kv_heads, num_tokens, head_dim, false, true);
  const Packed<S> values(num_kv_heads, num_tokens, value_dim, true, false);
  run_tasks(p.parallel, p.num_workers, num_kv_heads * num_kv_tiles, [&] {
    return [&](int64_t task) {
      const int64_t h = task / num_kv_tiles, n = task % num_kv_tiles;
      const int64_t n0 = n * kBlockN, n1 = std::min(num_tokens, n0 + kBlockN);
      pack_transposed<S>(k, num_kv_heads, head_dim, h, n0, n1, keys.tile(h, n));
      pack_rows<S>(v, num_kv_heads, value_dim, h, n0, n1, S(1), values.row(h, n0));
    };
  });

  struct Scratch {
    Buffer<S> q, scores, acc, row_max, row_sum;
    Scratch(int64_t wide, int64_t value_wide)
        : q(kBlockM * wide), scores(kBlockM * kBlockN), acc(kBlockM * value_wide), row_max(kBlockM), row_sum(kBlockM) {}
  };
  run_tasks(p.parallel, p.num_workers, num_heads * num_q_tiles, [&] {
    auto scratch = std::make_shared<Scratch>(wide, value_wide);
    return [&, scratch](int64_t task) {
      // the last query tiles are the deepest: they go first
      const int64_t tile = num_q_tiles - 1 - task / num_heads, h = task % num_heads, kv_head = h / group;
      const int64_t m0 = tile * kBlockM, m1 = std::min(num_tokens, m0 + kBlockM);
      S *b_q = scratch->q.get(), *scores = scratch->scores.get(), *acc = scratch->acc.get();
      S *row_max = scratch->row_max.get(), *row_sum = scratch->row_sum.get();
      pack_rows<S>(q, num_heads, head_dim, h, m0, m1, factor, b_q);
      std::fill(acc, acc + kBlockM * value_wide, S(0));
      std::fill(row_max, row_max + kBlockM, -std::numeric_limits<S>::infinity());
      std::fill(row_sum, row_sum + kBlockM, S(0));
      for (int64_t n = 0; n * kBlockN < m1; ++n) {
        const Region r = region(mask.tiles, n, num_tokens, m0, m1, p.mask.window, mask.row_pos_min[tile],
                                mask.row_pos_max[tile]);
        if (r.empty()) continue;
        const int64_t first = r.row0 - m0, rows = r.row1 - r.row0, cols = r.key1 - r.key0;
        product<S, false>(rows, cols, head_dim, b_q + first * wide, wide, 1, keys.tile(kv_head, n), kBlockN,
                          scores + first * kBlockN, kBlockN);
        const auto softmax = r.full ? softmax_region<S, true> : softmax_region<S, false>;
        softmax(mask, r, m0, p.mask.window, cap, scores, acc, value_wide, row_max, row_sum);
        product<S, true>(rows, value_wide, cols, scores + first * kBlockN, kBlockN, 1, values.row(kv_head, r.key0),
                         value_wide, acc + first * value_wide, value_wide);
      }
      for (int64_t i = m0; i < m1; ++i) {
        S high = row_max[i - m0], total = row_sum[i - m0], keep = 1;
        if (p.sinks) {
          const S sink = static_cast<S>(p.sinks[h] * kLog2e), top = std::max(high, sink);
          keep = std::exp2(high - top);
          total = total * keep + std::exp2(sink - top);
          high = top;
        }
        In* to = out + (i * num_heads + h) * value_dim;
        const S* from = acc + (i - m0) * value_wide;
        const S inverse = keep / total;
        for (int64_t d = 0; d < value_dim; ++d) narrow(from[d] * inverse, to + d);
        lse[i * num_heads + h] = static_cast<S>((high + std::log2(total)) / kLog2e);
      }
    };
  });
}

void forward(const ForwardParams& p) {
  switch (p.type) {
    case Type::kFloat32: return forward_typed<float, float>(p);
    case Type::kFloat64: return forward_typed<double, double>(p);
    case Type::kBFloat16: return forward_typed<float, uint16_t>(p);
  }
}
