// Backward, five products per tile pair: one task per (key/value head, run of key tiles) walks the contiguous rows that see
// each key tile, for every query head of the group.
//
//   p_ij = 2^(x_ij - lse_i)          dp_ij = dout_i . v_j        delta_i = dout_i . out_i
//   ds_ij = p_ij (dp_ij - delta_i)   dv_j = sum_i p_ij dout_i    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i
//
// dK and dV belong to one task. dQ is summed per run of key tiles, then over the runs in a fixed order: no atomics, and the
// runs depend on the tree alone, so the bits do not depend on the number of threads.
// Included once per instruction set, inside that set's namespace.

// runs per key/value head: enough tasks for many cores, few enough that the partial dQ stay small
constexpr int64_t kTargetTasks = 16;
constexpr int64_t kMaxRuns = 8;
constexpr int64_t kMinTilesPerRun = 8;

inline int64_t num_runs(int64_t num_kv_heads, int64_t num_kv_tiles) {
  const int64_t wanted = (kTargetTasks + num_kv_heads - 1) / num_kv_heads;
  return std::max<int64_t>(1, std::min({wanted, kMaxRuns, num_kv_tiles / kMinTilesPerRun}));
}

// scores -> p, dp -> ds in place over one region. `lse` is in base 2; with a softcap ds carries the derivative of the cap.
template <typename S, bool FULL>
inline void gradient_region(const MaskArrays& mask, const Region& r, int64_t m0, int64_t window, S cap, S* scores, S* dp,
                            const S* lse, const S* delta) {
  using V = Simd<S>;
  const int64_t cols = r.key1 - r.key0;
  for (int64_t i = r.row0; i < r.row1; ++i) {
    S *s = scores + (i - m0) * kBlockN, *g = dp + (i - m0) * kBlockN;
    for (int64_t n = 0; n < cols; n += V::kWidth) {
      typename V::Vec x = V::load(s + n), slope = V::all(S(1));
      if (cap > 0) {
        const typename V::Vec t = tanh<S>(x);
        slope = (S(1) - t * t) * static_cast<S>(cap / kLog2e);
        x = t * cap;
      }
      typename V::Vec p = exp2<S>(x - lse[i]);
      if constexpr (!FULL) p = visible<S>(mask, window, i, r.key0 + n) ? p : typename V::Vec{};
      V::store(s + n, p);
      typename V::Vec ds = p * (V::load(g + n) - delta[i]);
      if (cap > 0) ds *= slope;
      V::store(g + n, ds);
    }
  }
}

template <typename S, typename In>
void backward_typed(const BackwardParams& p) {
  const Shape& shape = p.shape;
  const int64_t num_tokens = shape.num_tokens, head_dim = shape.head_dim, value_dim = shape.value_dim;
  const int64_t num_heads = shape.num_heads, num_kv_heads = shape.num_kv_heads, group = num_heads / num_kv_heads;
  const int64_t num_q_tiles = (num_tokens + kBlockM - 1) / kBlockM;
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
  const double softcap = p.score.softcap;
  const S factor = static_cast<S>(query_factor(p.score));
  const S cap = static_cast<S>(softcap > 0 ? softcap * kLog2e : 0);
  // products with the packed q (= factor * q) and k give, without a softcap, gradients in base 2
  const S dk_factor = static_cast<S>(softcap > 0 ? 1 : 1 / kLog2e);
  const S dq_factor = static_cast<S>(softcap > 0 ? query_factor(p.score) : p.score.scale);
  const MaskArrays mask(p.mask, num_tokens);
  const int64_t num_kv_tiles = static_cast<int64_t>(mask.tiles.end_max.size());
  const int64_t runs = num_runs(num_kv_heads, num_kv_tiles);
  const std::vector<int64_t> cuts = balanced_chunks(mask.tiles, runs);

  const Packed<S> keys(num_kv_heads, num_tokens, head_dim, true, true);
  const Packed<S> values(num_kv_heads, num_tokens, value_dim, false, true);
  const Packed<S> queries(num_heads, num_tokens, head_dim, true, false);
  const Packed<S> grads(num_heads, num_tokens, value_dim, true, false);
  const Buffer<S> delta(num_heads * num_tokens), lse2(num_heads * num_tokens);  // [Hq][T]
  run_tasks(p.parallel, p.num_workers, num_kv_heads * num_kv_tiles, [&] {
    return [&](int64_t task) {
      const int64_t h = task / num_kv_tiles, n = task % num_kv_tiles;
      const int64_t n0 = n * kBlockN, n1 = std::min(num_tokens, n0 + kBlockN);
      pack_transposed<S>(k, num_kv_heads, head_dim, h, n0, n1, keys.tile(h, n));
      pack_transposed<S>(v, num_kv_heads, value_dim, h, n0, n1, values.tile(h, n));
      pack_rows<S>(k, num_kv_heads, head_dim, h, n0, n1, S(1), keys.row(h, n0));
    };
  });
  run_tasks(p.parallel, p.num_workers, num_heads * num_q_tiles, [&] {
    return [&](int64_t task) {
      const int64_t h = task / num_q_tiles, m0 = task % num_q_tiles * kBlockM, m1 = std::min(num_tokens, m0 + kBlockM);
      pack_rows<S>(q, num_heads, head_dim, h, m0, m1, factor, queries.row(h, m0));
      pack_rows<S>(dout, num_heads, value_dim, h, m0, m1, S(1), grads.row(h, m0));
      for (int64_t i = m0; i < m1; ++i) {
        const int64_t at = i * num_heads + h;
        S sum = 0;
        for (int64_t d = 0; d < value_dim; ++d) sum += widen(dout[at * value_dim + d]) * widen(out[at * value_dim + d]);
        delta.get()[h * num_tokens + i] = sum;
        lse2.get()[h * num_tokens + i] = static_cast<S>(lse[at] * kLog2e);
      }
    };
  });

  // partial dQ of run c: rows from its first key on; [c][Hq][T - first][padded D]
  std::vector<Buffer<S>> partial;
  for (int64_t c = 0; c < runs; ++c)
    partial.emplace_back(num_heads * std::max<int64_t>(0, num_tokens - cuts[c] * kBlockN) * wide);
  struct Scratch {
    Buffer<S> scores, dp, dk, dv;
    Scratch(int64_t wide, int64_t value_wide)
        : scores(kBlockM * kBlockN), dp(kBlockM * kBlockN), dk(kBlockN * wide), dv(kBlockN * value_wide) {}
  };
  run_tasks(p.parallel, p.num_workers, num_kv_heads * runs, [&] {
    auto scratch = std::make_shared<Scratch>(wide, value_wide);
    return [&, scratch](int64_t task) {
      const int64_t kv_head = task / runs, run = task % runs;
      const int64_t first_row = cuts[run] * kBlockN, num_rows = std::max<int64_t>(0, num_tokens - first_row);
      S *scores = scratch->scores.get(), *dp = scratch->dp.get(), *b_dk = scratch->dk.get(), *b_dv = scratch->dv.get();
      S* b_dq = partial[run].get() + kv_head * group * num_rows * wide;
      std::fill(b_dq, b_dq + group * num_rows * wide, S(0));
      for (int64_t n = cuts[run]; n < cuts[run + 1]; ++n) {
        const int64_t n0 = n * kBlockN, n1 = std::min(num_tokens, n0 + kBlockN);
        std::fill(b_dk, b_dk + kBlockN * wide, S(0));
        std::fill(b_dv, b_dv + kBlockN * value_wide, S(0));
        for (int64_t g = 0; g < group; ++g) {
          const int64_t h = kv_head * group + g;
          for (int64_t tile = n0 / kBlockM; tile * kBlockM < mask.tiles.end_max[n]; ++tile) {
            const int64_t m0 = tile * kBlockM, m1 = std::min(num_tokens, m0 + kBlockM);
            const Region r = region(mask.tiles, n, num_tokens, m0, m1, p.mask.window, mask.row_pos_min[tile],
                                    mask.row_pos_max[tile]);
            if (r.empty()) continue;
            const int64_t rows = r.row1 - r.row0, cols = r.key1 - r.key0;
            S *s = scores + (r.row0 - m0) * kBlockN, *ds = dp + (r.row0 - m0) * kBlockN;
            const S *b_q = queries.row(h, r.row0), *b_do = grads.row(h, r.row0);
            product<S, false>(rows, cols, head_dim, b_q, wide, 1, keys.tile(kv_head, n), kBlockN, s, kBlockN);
            product<S, false>(rows, cols, value_dim, b_do, value_wide, 1, values.tile(kv_head, n), kBlockN, ds, kBlockN);
            const auto gradient = r.full ? gradient_region<S, true> : gradient_region<S, false>;
            gradient(mask, r, m0, p.mask.window, cap, scores, dp, lse2.get() + h * num_tokens,
                     delta.get() + h * num_tokens);
            product<S, true>(cols, value_wide, rows, s, 1, kBlockN, b_do, value_wide, b_dv, value_wide);
            product<S, true>(cols, wide, rows, ds, 1, kBlockN, b_q, wide, b_dk, wide);
            product<S, true>(rows, wide, cols, ds, kBlockN, 1, keys.row(kv_head, n0), wide,
                             b_dq + (g * num_rows + r.row0 - first_row) * wide, wide);
          }
        }
        for (int64_t n_row = n0; n_row < n1; ++n_row) {
          In* to_k = dk + (n_row * num_kv_heads + kv_head) * head_dim;
          In* to_v = dv + (n_row * num_kv_heads + kv_head) * value_dim;
          for (int64_t d = 0; d < head_dim; ++d) narrow(b_dk[(n_row - n0) * wide + d] * dk_factor, to_k + d);
          for (int64_t d = 0; d < value_dim; ++d) narrow(b_dv[(n_row - n0) * value_wide + d], to_v + d);
        }
      }
    };
  });

  run_tasks(p.parallel, p.num_workers, num_q_tiles, [&] {
    return [&](int64_t tile) {
      for (int64_t i = tile * kBlockM; i < std::min(num_tokens, (tile + 1) * kBlockM); ++i) {
        for (int64_t h = 0; h < num_heads; ++h) {
          In* to = dq + (i * num_heads + h) * head_dim;
          for (int64_t d = 0; d < head_dim; ++d) {
            S sum = 0;
            for (int64_t c = 0; c < runs; ++c) {
              const int64_t first_row = cuts[c] * kBlockN;
              if (i >= first_row) sum += partial[c].get()[(h * (num_tokens - first_row) + i - first_row) * wide + d];
            }
            narrow(sum * dq_factor, to + d);
          }
        }
      }
    };
  });
}

void backward(const BackwardParams& p) {
  switch (p.type) {
    case Type::kFloat32: return backward_typed<float, float>(p);
    case Type::kFloat64: return backward_typed<double, double>(p);
    case Type::kBFloat16: return backward_typed<float, uint16_t>(p);
  }
}
