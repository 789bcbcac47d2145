// The launches: one warp per (token, head), warps of a block on neighbouring tokens of one head, which mostly read the same keys.
// No shared memory, no atomics, no host synchronisation; the arithmetic is in rows.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "../check.h"
#include "rows.h"

namespace treegrpo::cuda {

template <>
struct Number<__nv_bfloat16> {
  using Compute = float;
  static TREEGRPO_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static TREEGRPO_HD __nv_bfloat16 narrow(float x) { return __float2bfloat16(x); }
};

template <>
struct Number<__half> {
  using Compute = float;
  static TREEGRPO_HD float widen(__half x) { return __half2float(x); }
  static TREEGRPO_HD __half narrow(float x) { return __float2half(x); }
};

template <Type type>
struct InputOf;
template <>
struct InputOf<Type::kFloat32> { using T = float; };
template <>
struct InputOf<Type::kFloat64> { using T = double; };
template <>
struct InputOf<Type::kBFloat16> { using T = __nv_bfloat16; };
template <>
struct InputOf<Type::kFloat16> { using T = __half; };

constexpr int kThreads = kWarpLanes * kWarpsPerBlock;
// Blocks an SM must hold. Said, because ptxas otherwise aims higher and spills: it leaves a thread 128 registers, 255 for double.
template <typename T>
constexpr int kMinBlocks = sizeof(Compute<T>) == 8 ? 2 : 4;

struct Warp {
  static constexpr int kLanes = kWarpLanes;
  int lane;

  // Butterfly: every lane ends with the same bits.
  template <typename S>
  __device__ __forceinline__ S sum(S x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

__device__ __forceinline__ Warp this_warp() { return {static_cast<int>(threadIdx.x % kWarpLanes)}; }
// The warp's number is taken from lane 0, so that the compiler knows it to be the same in all lanes.
__device__ __forceinline__ int64_t this_token() {
  return token_of(blockIdx.x, __shfl_sync(0xffffffffu, threadIdx.x / kWarpLanes, 0));
}

template <int kElems, typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>) forward_kernel(const ForwardCall call) {
  const int64_t i = this_token();
  if (i < call.shape.num_tokens) forward_row<kElems, T>(this_warp(), call, i, blockIdx.y);
}

template <int kElems, typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>) dq_kernel(const BackwardCall call) {
  const int64_t i = this_token();
  if (i < call.shape.num_tokens) dq_row<kElems, T>(this_warp(), call, i, blockIdx.y);
}

template <int kElems, typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>) dkv_kernel(const BackwardCall call) {
  const int64_t j = this_token();
  if (j < call.shape.num_tokens) dkv_row<kElems, T>(this_warp(), call, j, blockIdx.y);
}

template <typename Call>
void launch(void (*kernel)(Call), const char* name, const Call& call, int64_t heads, void* stream) {
  const dim3 grid(static_cast<unsigned>(num_blocks(call.shape.num_tokens)), static_cast<unsigned>(heads));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  const cudaError_t error = cudaGetLastError();
  TREEGRPO_CHECK(error == cudaSuccess, std::string(name) + " kernel was not launched: " + cudaGetErrorString(error));
}

template <Type type>
void forward_typed(const ForwardCall& call, void* stream) {
  using T = typename InputOf<type>::T;
  const Shape& shape = call.shape;
  const int64_t dim = shape.head_dim > shape.value_dim ? shape.head_dim : shape.value_dim;
  const auto kernel = dim <= 64 ? forward_kernel<2, T> : dim <= 128 ? forward_kernel<4, T> : forward_kernel<8, T>;
  launch(kernel, "forward", call, shape.num_heads, stream);
}

template <Type type>
void backward_typed(const BackwardCall& call, void* stream) {
  using T = typename InputOf<type>::T;
  const Shape& shape = call.shape;
  const int64_t dim = shape.head_dim > shape.value_dim ? shape.head_dim : shape.value_dim;
  const auto dq = dim <= 64 ? dq_kernel<2, T> : dim <= 128 ? dq_kernel<4, T> : dq_kernel<8, T>;
  const auto dkv = dim <= 64 ? dkv_kernel<2, T> : dim <= 128 ? dkv_kernel<4, T> : dkv_kernel<8, T>;
  launch(dq, "dq", call, shape.num_heads, stream);
  launch(dkv, "dk and dv", call, shape.num_kv_heads, stream);
}

}  // namespace treegrpo::cuda
