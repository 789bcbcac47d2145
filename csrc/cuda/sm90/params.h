// What the Hopper kernels are launched with, and their tiles; no torch and no CUDA header.
// Shape legend: T packed tokens, Tp tokens rounded up to whole tiles of 128, Hq query heads, Hkv key/value heads, D head dim.
#pragma once

#include <cstdint>

#include "operands.h"
#include "schedule.h"

namespace treegrpo::sm90 {

enum class Half { kBFloat16, kFloat16 };

constexpr int kConsumers = 2;        // warpgroups that multiply; a third one loads
constexpr int kConsumerRows = 64;    // of a wgmma
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kPadding = 128;        // what T is rounded up to

// Query rows, key rows and depth of the ring of each kernel. Two stages of 128 keys fill what the queries leave of an SM's
// shared memory in the forward; NOTES.md has what other depths cost the Triton kernels of the same build.
template <int D>
struct ForwardTile {
  static constexpr int kRows = 128, kKeys = 128, kStages = D == 64 ? 4 : 2;
};
template <int D>
struct QueryGradTile {
  static constexpr int kRows = 128, kKeys = 64, kStages = D == 64 ? 4 : 3;
};
template <int D>
struct KeyGradTile {
  static constexpr int kRows = 64, kKeys = 128, kStages = D == 64 ? 4 : 3;
};

// A [T, heads, D] tensor whose heads are packed, as TMA sees it: a matrix [T, heads * D].
struct Matrix {
  const void* data;
  int64_t row_stride;  // elements
};

struct Sizes {
  int num_tokens, num_padded, num_heads, num_kv_heads;

  TREEGRPO_HD int group() const { return num_heads / num_kv_heads; }
};

}  // namespace treegrpo::sm90
