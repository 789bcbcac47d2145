// What one group of lanes computes for one row: the whole arithmetic of the portable CUDA kernels, and no CUDA in it.
//
// The D values of a row are split over the lanes of a group (value d lies in lane d % lanes), a dot product is one sum over the
// group. On the GPU the group is a warp; on the host the unit tests run the same source with one lane and with an imitated warp.
// Everything but the values of a row is the same in all lanes, so the lanes of a group never part ways.
//
//   x_ij = log2(e) s_ij        out_i = sum_j 2^(x_ij - log2(e) lse_i) v_j          delta_i = dout_i . out_i
//   ds_ij = p_ij (dout_i . v_j - delta_i) (1 - tanh^2)      dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i
//
// Which keys: j <= i is seen iff i < subtree_end[j]. If j is not seen, its subtree lies wholly before i and none of it is seen:
// the walk goes on at subtree_end[j], so it takes one step per visible key and one per branch passed by. Which rows: those of
// [j, subtree_end[j]). Neither needs a list.
#pragma once

#include <math.h>

#include <cstdint>

#include "attention.h"
#include "host_device.h"

namespace treegrpo::cuda {

// How an input type is widened to its computing type and rounded back; half precisions are added by the CUDA sources.
template <typename T>
struct Number;

template <>
struct Number<float> {
  using Compute = float;
  static TREEGRPO_HD float widen(float x) { return x; }
  static TREEGRPO_HD float narrow(float x) { return x; }
};

template <>
struct Number<double> {
  using Compute = double;
  static TREEGRPO_HD double widen(double x) { return x; }
  static TREEGRPO_HD double narrow(double x) { return x; }
};

template <typename T>
using Compute = typename Number<T>::Compute;

constexpr double kLog2e = 1.4426950408889634074;
constexpr int kWarpLanes = 32;
constexpr int kWarpsPerBlock = 4;
// Keys (or rows) taken together, so that their loads and sums overlap; backward keeps twice as much of each.
constexpr int kForwardChunk = 4;
constexpr int kBackwardChunk = 2;

// Which token a group works on: block `block` of a one-dimensional grid of num_blocks(T) blocks.
TREEGRPO_HD int64_t num_blocks(int64_t num_tokens) { return (num_tokens + kWarpsPerBlock - 1) / kWarpsPerBlock; }
TREEGRPO_HD int64_t token_of(int64_t block, int64_t warp) { return block * kWarpsPerBlock + warp; }

// The first key at or after j that query i sees; beyond i if there is none.
TREEGRPO_HD int64_t next_key(const Mask& mask, int64_t i, int64_t j) {
  while (j <= i) {
    const int64_t end = mask.subtree_end[j];
    if (end <= i) {
      j = end > j ? end : j + 1;
      continue;
    }
    if (!mask.window) return j;
    // depth grows by at most one a token, so that no token sooner than this is near enough
    const int64_t too_far = mask.position[i] - mask.position[j] - (mask.window - 1);
    if (too_far <= 0) return j;
    j += too_far;
  }
  return j;
}

// The first row at or after i of key j's subtree, which ends at `end`, that sees j; at or beyond `end` if there is none.
TREEGRPO_HD int64_t next_row(const Mask& mask, int64_t j, int64_t end, int64_t i) {
  if (!mask.window) return i;
  while (i < end && mask.position[i] - mask.position[j] >= mask.window) {
    // everything below a row that is too deep is deeper still
    const int64_t below = mask.subtree_end[i];
    i = below > i ? below : i + 1;
  }
  return i;
}

// Scores in base 2 from dot products of which one side was multiplied by `factor`.
template <typename S>
struct Scorer {
  S factor;
  S cap;  // 0: none

  explicit TREEGRPO_HD Scorer(const Score& score)
      : factor(static_cast<S>(score.softcap > 0 ? score.scale / score.softcap : score.scale * kLog2e)),
        cap(static_cast<S>(score.softcap > 0 ? score.softcap * kLog2e : 0)) {}

  TREEGRPO_HD S score(S dot) const { return cap > 0 ? cap * tanh(dot) : dot; }
  // The score, and in `slope` what the softcap leaves of a gradient.
  TREEGRPO_HD S score(S dot, S& slope) const {
    slope = S(1);
    if (!(cap > 0)) return dot;
    const S t = tanh(dot);
    slope = S(1) - t * t;
    return cap * t;
  }
};

template <typename T>
TREEGRPO_HD const T* row_of(const View& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

template <int kElems, typename T, typename Group>
TREEGRPO_HD void load_row(const Group& group, const T* row, int dim, Compute<T> factor, Compute<T> (&to)[kElems]) {
  TREEGRPO_UNROLL
  for (int e = 0; e < kElems; ++e) {
    const int d = group.lane + e * Group::kLanes;
    to[e] = d < dim ? Number<T>::widen(row[d]) * factor : Compute<T>(0);
  }
}

template <int kElems, typename T, typename Group>
TREEGRPO_HD void store_row(const Group& group, const Compute<T> (&from)[kElems], int dim, Compute<T> factor, T* row) {
  TREEGRPO_UNROLL
  for (int e = 0; e < kElems; ++e) {
    const int d = group.lane + e * Group::kLanes;
    if (d < dim) row[d] = Number<T>::narrow(from[e] * factor);
  }
}

template <int kElems, typename S>
TREEGRPO_HD S dot(const S (&a)[kElems], const S (&b)[kElems]) {
  S sum = 0;
  TREEGRPO_UNROLL
  for (int e = 0; e < kElems; ++e) sum += a[e] * b[e];
  return sum;
}

template <int kElems, typename S>
TREEGRPO_HD void add_scaled(S (&to)[kElems], S factor, const S (&from)[kElems]) {
  TREEGRPO_UNROLL
  for (int e = 0; e < kElems; ++e) to[e] += factor * from[e];
}

// out and lse of query row i, head h.
template <int kElems, typename T, typename Group>
TREEGRPO_HD void forward_row(const Group& group, const ForwardCall& call, int64_t i, int64_t h) {
  using S = Compute<T>;
  const Shape& shape = call.shape;
  const int64_t kv_head = h / (shape.num_heads / shape.num_kv_heads);
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const Scorer<S> scorer(call.score);
  S q[kElems], acc[kElems] = {};
  load_row(group, row_of<T>(call.q, i, h), head_dim, scorer.factor, q);
  S high = -INFINITY, sum = 0;

  for (int64_t j = next_key(call.mask, i, 0); j <= i;) {
    int64_t key[kForwardChunk];
    bool seen[kForwardChunk];
    S x[kForwardChunk];
    TREEGRPO_UNROLL
    for (int n = 0; n < kForwardChunk; ++n) {
      seen[n] = j <= i;
      key[n] = seen[n] ? j : i;  // a row sees itself: reading it again is harmless
      if (seen[n]) j = next_key(call.mask, i, j + 1);
    }
    TREEGRPO_UNROLL
    for (int n = 0; n < kForwardChunk; ++n) {
      S k[kElems];
      load_row(group, row_of<T>(call.k, key[n], kv_head), head_dim, S(1), k);
      x[n] = scorer.score(group.sum(dot(q, k)));
      if (!seen[n]) x[n] = -INFINITY;
    }
    S new_high = high;
    TREEGRPO_UNROLL
    for (int n = 0; n < kForwardChunk; ++n) new_high = fmax(new_high, x[n]);
    const S keep = exp2(high - new_high);
    high = new_high;
    sum *= keep;
    TREEGRPO_UNROLL
    for (int e = 0; e < kElems; ++e) acc[e] *= keep;
    TREEGRPO_UNROLL
    for (int n = 0; n < kForwardChunk; ++n) {
      S v[kElems];
      load_row(group, row_of<T>(call.v, key[n], kv_head), value_dim, S(1), v);
      const S p = exp2(x[n] - high);
      sum += p;
      add_scaled(acc, p, v);
    }
  }

  S keep = 1;
  if (call.sinks) {
    const S sink = static_cast<const S*>(call.sinks)[h] * static_cast<S>(kLog2e);
    const S top = fmax(high, sink);
    keep = exp2(high - top);
    sum = sum * keep + exp2(sink - top);
    high = top;
  }
  const int64_t row = i * shape.num_heads + h;
  store_row(group, acc, value_dim, keep / sum, static_cast<T*>(call.out) + row * value_dim);
  if (group.lane == 0) static_cast<S*>(call.lse)[row] = (high + log2(sum)) / static_cast<S>(kLog2e);
}

// dq and delta of query row i, head h.
template <int kElems, typename T, typename Group>
TREEGRPO_HD void dq_row(const Group& group, const BackwardCall& call, int64_t i, int64_t h) {
  using S = Compute<T>;
  const Shape& shape = call.shape;
  const int64_t kv_head = h / (shape.num_heads / shape.num_kv_heads);
  const int64_t row = i * shape.num_heads + h;
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const Scorer<S> scorer(call.score);
  S q[kElems], dout[kElems], dq[kElems] = {};
  load_row(group, row_of<T>(call.q, i, h), head_dim, scorer.factor, q);
  load_row(group, row_of<T>(call.dout, i, h), value_dim, S(1), dout);
  load_row(group, row_of<T>(call.out, i, h), value_dim, S(1), dq);
  const S delta = group.sum(dot(dout, dq));
  if (group.lane == 0) static_cast<S*>(call.delta)[row] = delta;
  const S lse = static_cast<const S*>(call.lse)[row] * static_cast<S>(kLog2e);
  TREEGRPO_UNROLL
  for (int e = 0; e < kElems; ++e) dq[e] = 0;

  for (int64_t j = next_key(call.mask, i, 0); j <= i;) {
    TREEGRPO_UNROLL
    for (int n = 0; n < kBackwardChunk; ++n) {
      const bool seen = j <= i;
      const int64_t key = seen ? j : i;
      if (seen) j = next_key(call.mask, i, j + 1);
      S k[kElems], v[kElems], slope;
      load_row(group, row_of<T>(call.k, key, kv_head), head_dim, S(1), k);
      load_row(group, row_of<T>(call.v, key, kv_head), value_dim, S(1), v);
      const S x = scorer.score(group.sum(dot(q, k)), slope);
      const S dp = group.sum(dot(dout, v));
      const S p = seen ? exp2(x - lse) : S(0);
      add_scaled(dq, p * (dp - delta) * slope, k);
    }
  }
  store_row(group, dq, head_dim, static_cast<S>(call.score.scale), static_cast<T*>(call.dq) + row * head_dim);
}

// dk and dv of key j, key/value head g: over the rows of j's subtree and the query heads of g. Reads delta.
template <int kElems, typename T, typename Group>
TREEGRPO_HD void dkv_row(const Group& group, const BackwardCall& call, int64_t j, int64_t g) {
  using S = Compute<T>;
  const Shape& shape = call.shape;
  const int64_t heads = shape.num_heads / shape.num_kv_heads;
  const int64_t end = call.mask.subtree_end[j];
  const int head_dim = static_cast<int>(shape.head_dim), value_dim = static_cast<int>(shape.value_dim);
  const Scorer<S> scorer(call.score);
  S k[kElems], v[kElems], dk[kElems] = {}, dv[kElems] = {};
  load_row(group, row_of<T>(call.k, j, g), head_dim, scorer.factor, k);
  load_row(group, row_of<T>(call.v, j, g), value_dim, S(1), v);

  for (int64_t h = g * heads; h < (g + 1) * heads; ++h) {
    for (int64_t i = j; i < end;) {
      TREEGRPO_UNROLL
      for (int n = 0; n < kBackwardChunk; ++n) {
        const bool sees = i < end;
        const int64_t token = sees ? i : j;
        if (sees) i = next_row(call.mask, j, end, i + 1);
        const int64_t row = token * shape.num_heads + h;
        S q[kElems], dout[kElems], slope;
        load_row(group, row_of<T>(call.q, token, h), head_dim, S(1), q);
        load_row(group, row_of<T>(call.dout, token, h), value_dim, S(1), dout);
        const S lse = static_cast<const S*>(call.lse)[row] * static_cast<S>(kLog2e);
        const S delta = static_cast<const S*>(call.delta)[row];
        const S x = scorer.score(group.sum(dot(k, q)), slope);
        const S dp = group.sum(dot(v, dout));
        const S p = sees ? exp2(x - lse) : S(0);
        add_scaled(dv, p, dout);
        add_scaled(dk, p * (dp - delta) * slope, q);
      }
    }
  }
  const int64_t row = j * shape.num_kv_heads + g;
  store_row(group, dk, head_dim, static_cast<S>(call.score.scale), static_cast<T*>(call.dk) + row * head_dim);
  store_row(group, dv, value_dim, S(1), static_cast<T*>(call.dv) + row * value_dim);
}

}  // namespace treegrpo::cuda
