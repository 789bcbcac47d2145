// Entry points of the Hopper kernels; no torch and no CUDA header.
// Shape legend: T packed tokens, Tp tokens rounded up to kPadding, Hq query heads, Hkv key/value heads, D head dim.
#pragma once

#include "params.h"

namespace treegrpo::sm90 {

// subtree_end over tiles of consecutive keys, the last one with 0 as its least where it reaches past T.
struct Ends {
  const int32_t* least;
  const int32_t* most;
};

struct ForwardCall {
  Sizes sizes;
  Matrix q, k, v;
  const float* sinks;   // [Hq] or null
  Lists lists;          // tiles of 128 queries, 128 keys
  Ends ends;            // per 128 keys
  const int32_t* span;  // [Tp] subtree_end[j] - j, 0 past T
  float scale;
  void* out;   // [T, Hq, D] contiguous
  float* lse;  // [T, Hq]
};

struct BackwardCall {
  Sizes sizes;
  Matrix dout, q, k, v, out;
  const float* lse;        // [T, Hq]
  Lists lists;             // tiles of 128 queries, 64 keys; not read when not deterministic
  Ends ends, half_ends;    // per 128 and per 64 keys, the latter of even number
  const int32_t* items;    // [items, 4], KeyItems
  const int32_t* parted;   // [parted, 3] key tile, its first slot, how many
  int num_items, num_parted;
  const int32_t* span;
  float scale;
  bool deterministic;
  float *lse2, *delta;               // [Hq, Tp] scratch
  float *partial_dk, *partial_dv;    // [slots, Hkv, 128, D] scratch
  float* dq_sums;                    // when not deterministic: [Hq, Tp, D] scratch, zeros
  void *dq, *dk, *dv;                // contiguous
};

// On the current device, queued on `stream` (a cudaStream_t); T > 0. Throw std::runtime_error if a launch is refused. Compiled
// one instance a file.
template <int D, Half type>
void forward(const ForwardCall& call, void* stream);
template <int D, Half type>
void backward(const BackwardCall& call, void* stream);

}  // namespace treegrpo::sm90
