// The kernels of elementwise.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "elementwise.h"

namespace treegrpo::sm90 {

// Pairs of values of a type in global memory; `at` is even.
template <Half type>
struct Element {
  using Words = std::conditional_t<type == Half::kBFloat16, __nv_bfloat162, __half2>;

  static __device__ __forceinline__ Pair load(const void* values, int64_t at) {
    const Words both = *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(values) + at);
    float2 wide;
    if constexpr (type == Half::kBFloat16) wide = __bfloat1622float2(both);
    else wide = __half22float2(both);
    return {wide.x, wide.y};
  }
  static __device__ __forceinline__ void store(void* values, int64_t at, Pair x) {
    Words& both = *reinterpret_cast<Words*>(static_cast<uint16_t*>(values) + at);
    if constexpr (type == Half::kBFloat16) both = __floats2bfloat162_rn(x.x, x.y);
    else both = __floats2half2_rn(x.x, x.y);
  }
};

struct Lanes {
  int lane;

  // Butterfly: every lane ends with the same bits.
  __device__ __forceinline__ float sum(float x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

template <int D, Half type>
__global__ void __launch_bounds__(kElementThreads) row_sums_kernel(const BackwardCall call) {
  const int warp = blockIdx.x * (kElementThreads / 32) + threadIdx.x / 32;
  row_sums<D, Element<type>>(Lanes{static_cast<int>(threadIdx.x % 32)}, call, warp * kRowsPerWarp, blockIdx.y);
}

template <int D, Half type>
__global__ void __launch_bounds__(kElementThreads) part_sums_kernel(const BackwardCall call) {
  part_sums<D, Element<type>>(call, blockIdx.x, blockIdx.y, threadIdx.x);
}

template <int D, Half type>
__global__ void __launch_bounds__(kWarpgroup) query_grad_kernel(const BackwardCall call) {
  query_grad<D, Element<type>>(call, blockIdx.x, blockIdx.y, threadIdx.x);
}

}  // namespace treegrpo::sm90
