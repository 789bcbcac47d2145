// What surrounds the products of the backward pass: row sums before it, sums of partials and roundings after it. Element reads
// and writes pairs of 16-bit values; the unit tests bring their own.
#pragma once

#include <math.h>

#include "attention.h"
#include "operands.h"

namespace treegrpo::sm90 {

struct Pair {
  float x, y;
};

constexpr int kElementThreads = 256, kRowsPerWarp = 4;

// delta_i = dout_i . out_i and lse in base 2, both as [Hq, Tp], so that the passes read them in runs; rows past T get p = 0.
// One warp, which has `lane` and `sum`, does kRowsPerWarp rows from `first` on, of which Tp is a multiple.
template <int D, class Element, class Warp>
TREEGRPO_HD void row_sums(const Warp& warp, const BackwardCall& call, int first, int head) {
  float delta = 0, lse = INFINITY;
  TREEGRPO_UNROLL
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = first + r;
    if (row >= call.sizes.num_tokens) break;
    float sum = 0;
    TREEGRPO_UNROLL
    for (int at = 0; at < D / 64; ++at) {
      const int64_t column = head * D + at * 64 + warp.lane * 2;
      const Pair out = Element::load(call.out.data, row * call.out.row_stride + column);
      const Pair dout = Element::load(call.dout.data, row * call.dout.row_stride + column);
      sum += out.x * dout.x + out.y * dout.y;
    }
    sum = warp.sum(sum);
    if (warp.lane == r) delta = sum, lse = call.lse[int64_t{row} * call.sizes.num_heads + head];
  }
  if (warp.lane >= kRowsPerWarp) return;
  const int64_t to = int64_t{head} * call.sizes.num_padded + first + warp.lane;
  call.delta[to] = delta;
  call.lse2[to] = lse * 1.4426950408889634f;
}

// Adds up the partials of parted key tile `part`, in the order of the pieces: same inputs, same bits. One of kElementThreads.
template <int D, class Element>
TREEGRPO_HD void part_sums(const BackwardCall& call, int part, int head, int thread) {
  const int heads = call.sizes.num_kv_heads;
  const int32_t* entry = call.parted + part * 3;
  const int64_t block = kPadding * D, step = heads * block, start = (int64_t{entry[1]} * heads + head) * block;
  const int row = entry[0] * kPadding;
  for (int at = thread * 2; at < kPadding * D; at += kElementThreads * 2) {
    if (row + at / D >= call.sizes.num_tokens) break;
    Pair k = {0, 0}, v = {0, 0};
    for (int piece = 0; piece < entry[2]; ++piece) {
      const float *more_k = call.partial_dk + start + piece * step + at, *more_v = call.partial_dv + start + piece * step + at;
      k.x += more_k[0], k.y += more_k[1], v.x += more_v[0], v.y += more_v[1];
    }
    const int64_t to = (int64_t{row + at / D} * heads + head) * D + at % D;
    Element::store(call.dk, to, {k.x * call.scale, k.y * call.scale});
    Element::store(call.dv, to, v);
  }
}

// Rounds the sums of dQ in one tile of 64 rows and 64 columns, number `block` of a head: accumulators lie by fours as
// their threads wrote them (KeyGrad::add_query_grad). One of kWarpgroup threads.
template <int D, class Element>
TREEGRPO_HD void query_grad(const BackwardCall& call, int block, int head, int thread) {
  constexpr int kPanels = D / kPanelColumns, kBlock = 64 * kPanelColumns;
  const int tile = block / kPanels, panel = block % kPanels;
  const float* sums = call.dq_sums + (int64_t{head} * (call.sizes.num_padded / 64) * kPanels + block) * kBlock;
  TREEGRPO_UNROLL
  for (int i = 0; i < kBlock / kWarpgroup; i += 2) {
    const int row = tile * 64 + row_of(thread, i);
    if (row >= call.sizes.num_tokens) continue;
    const float* from = sums + (i / 4 * kWarpgroup + thread) * 4 + i % 4;
    const int64_t to = (int64_t{row} * call.sizes.num_heads + head) * D + panel * kPanelColumns + column_of(thread, i);
    Element::store(call.dq, to, {from[0] * call.scale, from[1] * call.scale});
  }
}

}  // namespace treegrpo::sm90
