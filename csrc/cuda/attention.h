// Entry points of the portable CUDA kernels; no torch and no CUDA header, so that bindings and host tests include it alike.
// Shape legend: T packed tokens, Hq query heads, Hkv key/value heads, D head dim of queries and keys, Dv head dim of values.
#pragma once

#include <cstdint>

#include "../params.h"

namespace treegrpo::cuda {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A [T, heads, dim] tensor with dense rows; strides in elements.
struct View {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// "Computing type" below: float, double for kFloat64.
struct ForwardCall {
  Shape shape;
  Mask mask;
  Score score;
  View q;             // [T, Hq, D]
  View k;             // [T, Hkv, D]
  View v;             // [T, Hkv, Dv]
  const void* sinks;  // [Hq] computing type, or null
  void* out;          // [T, Hq, Dv] contiguous
  void* lse;          // [T, Hq] computing type
};

struct BackwardCall {
  Shape shape;
  Mask mask;
  Score score;
  View dout;        // [T, Hq, Dv]
  View q;           // [T, Hq, D]
  View k;           // [T, Hkv, D]
  View v;           // [T, Hkv, Dv]
  View out;         // [T, Hq, Dv]
  const void* lse;  // [T, Hq] computing type, contiguous
  void* delta;      // [T, Hq] computing type: scratch, written with dq and read for dk and dv
  void* dq;         // [T, Hq, D] contiguous
  void* dk;         // [T, Hkv, D] contiguous
  void* dv;         // [T, Hkv, Dv] contiguous
};

// On the current device, queued on `stream` (a cudaStream_t); T > 0, Hq > 0. Throw std::runtime_error if a launch is refused.
// Compiled one type a file.
template <Type type>
void forward_typed(const ForwardCall& call, void* stream);
template <Type type>
void backward_typed(const BackwardCall& call, void* stream);

}  // namespace treegrpo::cuda
