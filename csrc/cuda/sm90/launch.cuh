// The kernels as the GPU starts them, and their launches. Machine code exists for sm_90a alone; for other architectures, for which
// the same files are compiled, the kernels are empty; treegrpo_kernels/hopper_cuda.py keeps calls from such a GPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "../../check.h"
#include "backward_dkv.h"
#include "backward_dq.h"
#include "elementwise.cuh"
#include "forward.h"
#include "maps.h"
#include "ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TREEGRPO_ON_HOPPER(...) __VA_ARGS__
#else
#define TREEGRPO_ON_HOPPER(...)
#endif

namespace treegrpo::sm90 {

template <int D, Half type>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ ForwardParams<CUtensorMap> params) {
  TREEGRPO_ON_HOPPER(Gpu gpu; Forward<Gpu, D, type>::run(gpu, params);)
}

template <int D, Half type>
__global__ void __launch_bounds__(kThreads, 1) dq_kernel(const __grid_constant__ QueryGradParams<CUtensorMap> params) {
  TREEGRPO_ON_HOPPER(Gpu gpu; QueryGrad<Gpu, D, type>::run(gpu, params);)
}

template <int D, Half type, bool kAddQueryGrad>
__global__ void __launch_bounds__(kThreads, 1) dkv_kernel(const __grid_constant__ KeyGradParams<CUtensorMap> params) {
  TREEGRPO_ON_HOPPER(Gpu gpu; KeyGrad<Gpu, D, type, kAddQueryGrad>::run(gpu, params);)
}

inline void check(cudaError_t error, const char* what) {
  TREEGRPO_CHECK(error == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

constexpr int kSharedLimit = 227 << 10;  // of a block

template <int num_bytes, typename Params>
void launch(void (*kernel)(Params), const char* name, const Params& params, int num_blocks, void* stream) {
  static_assert(num_bytes <= kSharedLimit);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes), name);
  kernel<<<num_blocks, kThreads, num_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), name);
}

inline int multiprocessors() {
  int device, count;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "its multiprocessors");
  return count;
}

constexpr float kLog2e = 1.4426950408889634f;
inline int tiles(int num_tokens, int size) { return (num_tokens + size - 1) / size; }

template <int D, Half type>
void forward(const ForwardCall& call, void* stream) {
  using Tile = ForwardTile<D>;
  const Sizes& s = call.sizes;
  const int query_columns = s.num_heads * D, key_columns = s.num_kv_heads * D;
  const int num_items = tiles(s.num_tokens, Tile::kRows) * s.num_heads;
  const ForwardParams<CUtensorMap> params{
      map_of(type, call.q, s.num_tokens, query_columns, kConsumerRows),
      map_of(type, {call.out, query_columns}, s.num_tokens, query_columns, kConsumerRows),
      map_of(type, call.k, s.num_tokens, key_columns, Tile::kKeys),
      map_of(type, call.v, s.num_tokens, key_columns, Tile::kKeys),
      call.lists, call.span, call.ends.least, call.ends.most, call.sinks, call.lse, s, num_items, call.scale * kLog2e};
  launch<ForwardMemory<D>::kBytes>(forward_kernel<D, type>, "forward", params, std::min(num_items, multiprocessors()), stream);
}

template <int D, Half type, bool kAddQueryGrad>
void launch_dkv(const BackwardCall& call, void* stream) {
  const Sizes& s = call.sizes;
  const auto queries = [&](const Matrix& x) { return map_of(type, x, s.num_tokens, s.num_heads * D, KeyGradTile<D>::kRows); };
  const auto keys = [&](const Matrix& x) { return map_of(type, x, s.num_tokens, s.num_kv_heads * D, kConsumerRows); };
  const int64_t key_stride = int64_t{s.num_kv_heads} * D;
  const KeyGradParams<CUtensorMap> params{
      queries(call.q), queries(call.dout), keys(call.k), keys(call.v), keys({call.dk, key_stride}), keys({call.dv, key_stride}),
      {call.items, call.ends.most, call.ends.least}, call.span, call.half_ends.least, call.half_ends.most, call.lse2, call.delta,
      call.partial_dk, call.partial_dv, call.dq_sums, s, call.scale, call.scale * kLog2e};
  launch<KeyGradMemory<D, kAddQueryGrad>::kBytes>(dkv_kernel<D, type, kAddQueryGrad>, "dk and dv", params,
                                                  call.num_items * s.num_kv_heads, stream);
}

template <int D, Half type>
void launch_dq(const BackwardCall& call, void* stream) {
  using Tile = QueryGradTile<D>;
  const Sizes& s = call.sizes;
  const auto queries = [&](const Matrix& x) { return map_of(type, x, s.num_tokens, s.num_heads * D, kConsumerRows); };
  const auto keys = [&](const Matrix& x) { return map_of(type, x, s.num_tokens, s.num_kv_heads * D, Tile::kKeys); };
  const int num_items = tiles(s.num_tokens, Tile::kRows) * s.num_heads;
  const QueryGradParams<CUtensorMap> params{
      queries(call.q), queries(call.dout), queries({call.dq, int64_t{s.num_heads} * D}), keys(call.k), keys(call.v), call.lists,
      call.span, call.half_ends.least, call.half_ends.most, call.lse2, call.delta, s, num_items, call.scale, call.scale * kLog2e};
  launch<QueryGradMemory<D>::kBytes>(dq_kernel<D, type>, "dq", params, std::min(num_items, multiprocessors()), stream);
}

template <int D, Half type>
void backward(const BackwardCall& call, void* stream) {
  const Sizes& s = call.sizes;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto heads = static_cast<unsigned>(s.num_heads);
  row_sums_kernel<D, type><<<dim3(tiles(s.num_padded, kElementThreads / 32 * kRowsPerWarp), heads), kElementThreads, 0, queue>>>(call);
  check(cudaGetLastError(), "row sums");
  if (call.deterministic) {
    launch_dq<D, type>(call, stream);
    launch_dkv<D, type, false>(call, stream);
  } else {
    launch_dkv<D, type, true>(call, stream);
    query_grad_kernel<D, type><<<dim3(tiles(s.num_tokens, 64) * (D / kPanelColumns), heads), kWarpgroup, 0, queue>>>(call);
    check(cudaGetLastError(), "dq");
  }
  if (call.num_parted == 0) return;
  part_sums_kernel<D, type><<<dim3(call.num_parted, s.num_kv_heads), kElementThreads, 0, queue>>>(call);
  check(cudaGetLastError(), "sums of partials");
}

}  // namespace treegrpo::sm90
