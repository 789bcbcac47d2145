// What one attention call is, without torch. Shape legend: T packed tokens, Hq query heads, Hkv key/value heads, D head dim of
// queries and keys, Dv head dim of values.
#pragma once

#include <cstdint>
#include <functional>

namespace treegrpo {

enum class Type { kFloat32, kFloat64, kBFloat16 };

constexpr int kMaxDim = 256;  // of D and of Dv

struct Shape {
  int64_t num_tokens;
  int64_t num_heads;     // Hq
  int64_t num_kv_heads;  // Hkv
  int64_t head_dim;      // D
  int64_t value_dim;     // Dv
};

struct Mask {
  const int32_t* subtree_end;  // [T] key j is visible to query i iff j <= i < subtree_end[j]
  const int32_t* position;     // [T] depth in tokens
  int64_t window;              // 0: none; else position[i] - position[j] < window
};

struct Score {
  double scale;    // s = scale * q.k
  double softcap;  // 0: none; else s = softcap * tanh(s / softcap)
};

// Runs body(worker) for worker = 0 .. num_workers - 1, at once where threads allow.
using Parallel = std::function<void(int64_t num_workers, const std::function<void(int64_t)>& body)>;

struct ForwardParams {
  Type type;
  Shape shape;
  Mask mask;
  Score score;
  const void* q;        // [T, Hq, D]
  const void* k;        // [T, Hkv, D]
  const void* v;        // [T, Hkv, Dv]
  const double* sinks;  // [Hq] or null
  void* out;            // [T, Hq, Dv]
  void* lse;            // [T, Hq] float, double for kFloat64
  int64_t num_workers;
  Parallel parallel;
};

struct BackwardParams {
  Type type;
  Shape shape;
  Mask mask;
  Score score;
  const void* dout;  // [T, Hq, Dv]
  const void* q;     // [T, Hq, D]
  const void* k;     // [T, Hkv, D]
  const void* v;     // [T, Hkv, Dv]
  const void* out;   // [T, Hq, Dv]
  const void* lse;   // [T, Hq] float, double for kFloat64
  void* dq;          // [T, Hq, D]
  void* dk;          // [T, Hkv, D]
  void* dv;          // [T, Hkv, Dv]
  int64_t num_workers;
  Parallel parallel;
};

}  // namespace treegrpo
