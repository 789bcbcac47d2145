// What surrounds the products of the backward pass: row sums before it, sums of partials and roundings after it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.h"
#include "operands.h"

namespace treegrpo::sm90 {

template <Half type>
struct ElementOf;
template <>
struct ElementOf<Half::kBFloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(Pair x) { return __bfloat1622float2(x); }
  static __device__ __forceinline__ Pair narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct ElementOf<Half::kFloat16> {
  using Pair = __half2;
  static __device__ __forceinline__ float2 widen(Pair x) { return __half22float2(x); }
  static __device__ __forceinline__ Pair narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

constexpr int kElementThreads = 256, kWarps = kElementThreads / 32, kRowsPerWarp = 4;

// delta_i = dout_i . out_i and lse in base 2, both as [Hq, Tp], so that the passes read them in runs; rows past T get p = 0.
template <int D, Half type>
__global__ void __launch_bounds__(kElementThreads) row_sums_kernel(const BackwardCall call) {
  using Element = ElementOf<type>;
  using Pair = typename Element::Pair;
  const int lane = threadIdx.x % 32, head = blockIdx.y, first = (blockIdx.x * kWarps + threadIdx.x / 32) * kRowsPerWarp;
  float delta = 0, lse = INFINITY;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = first + r;
    if (row >= call.sizes.num_tokens) break;
    float sum = 0;
#pragma unroll
    for (int at = 0; at < D / 64; ++at) {
      const int64_t column = head * D + at * 64 + lane * 2;
      const auto load = [&](const Matrix& x) {
        const auto* values = static_cast<const uint16_t*>(x.data) + row * x.row_stride + column;
        return Element::widen(*reinterpret_cast<const Pair*>(values));
      };
      const float2 out = load(call.out), dout = load(call.dout);
      sum += out.x * dout.x + out.y * dout.y;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == r) delta = sum, lse = call.lse[int64_t{row} * call.sizes.num_heads + head];
  }
  if (lane >= kRowsPerWarp || first + lane >= call.sizes.num_padded) return;
  const int64_t to = int64_t{head} * call.sizes.num_padded + first + lane;
  call.delta[to] = delta;
  call.lse2[to] = lse * 1.4426950408889634f;
}

// Adds up the partials of the parted key tiles, in the order of the pieces: same inputs, same bits.
template <int D, Half type>
__global__ void __launch_bounds__(kElementThreads) part_sums_kernel(const BackwardCall call) {
  using Element = ElementOf<type>;
  const int heads = call.sizes.num_kv_heads, head = blockIdx.y;
  const int32_t* entry = call.parted + blockIdx.x * 3;
  const int64_t block = kPadding * D, step = heads * block, start = (int64_t{entry[1]} * heads + head) * block;
  const int row = entry[0] * kPadding;
  for (int at = threadIdx.x * 2; at < kPadding * D; at += kElementThreads * 2) {
    if (row + at / D >= call.sizes.num_tokens) break;
    float2 k = {0, 0}, v = {0, 0};
    for (int piece = 0; piece < entry[2]; ++piece) {
      const auto load = [&](const float* x) { return *reinterpret_cast<const float2*>(x + start + piece * step + at); };
      const float2 more_k = load(call.partial_dk), more_v = load(call.partial_dv);
      k.x += more_k.x, k.y += more_k.y, v.x += more_v.x, v.y += more_v.y;
    }
    const int64_t to = (int64_t{row + at / D} * heads + head) * D + at % D;
    const auto store = [&](void* x, float2 value) {
      *reinterpret_cast<typename Element::Pair*>(static_cast<uint16_t*>(x) + to) = Element::narrow(value.x, value.y);
    };
    store(call.dk, {k.x * call.scale, k.y * call.scale});
    store(call.dv, v);
  }
}

// Rounds the sums of dQ: one block a tile of 64 rows and 64 columns, see sum_of.
template <int D, Half type>
__global__ void __launch_bounds__(kWarpgroup) query_grad_kernel(const BackwardCall call) {
  using Element = ElementOf<type>;
  constexpr int kPanels = D / kPanelColumns, kBlock = 64 * kPanelColumns;
  const int head = blockIdx.y, tile = blockIdx.x / kPanels, panel = blockIdx.x % kPanels, thread = threadIdx.x;
  const int64_t block = (int64_t{head} * (call.sizes.num_padded / 64) + tile) * kPanels + panel;
#pragma unroll
  for (int i = 0; i < kBlock / kWarpgroup; i += 4) {
    const float4 sums = *reinterpret_cast<const float4*>(call.dq_sums + block * kBlock + (i / 4 * kWarpgroup + thread) * 4);
    const auto store = [&](int i, float x, float y) {
      const int row = tile * 64 + row_of(thread, i);
      if (row >= call.sizes.num_tokens) return;
      const int64_t to = (int64_t{row} * call.sizes.num_heads + head) * D + panel * kPanelColumns + column_of(thread, i);
      *reinterpret_cast<typename Element::Pair*>(static_cast<uint16_t*>(call.dq) + to) =
          Element::narrow(x * call.scale, y * call.scale);
    };
    store(i, sums.x, sums.y);
    store(i + 2, sums.z, sums.w);
  }
}

}  // namespace treegrpo::sm90
