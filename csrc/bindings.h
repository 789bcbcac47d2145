// What all bindings check before any pointer is taken. Only bindings include this: it knows torch.
// Shape legend: T packed tokens, Hq query heads, Hkv key/value heads, D head dim of queries and keys, Dv head dim of values.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "check.h"
#include "params.h"

namespace treegrpo {

inline Shape check_inputs(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v) {
  TREEGRPO_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v must be [T, heads, head_dim]");
  const Shape shape{q.size(0), q.size(1), k.size(1), q.size(2), v.size(2)};
  TREEGRPO_CHECK(k.size(0) == shape.num_tokens && v.size(0) == shape.num_tokens, "k and v must have q's T");
  TREEGRPO_CHECK(v.size(1) == shape.num_kv_heads && shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
                 "k and v must have the same number of heads, a divisor of q's");
  TREEGRPO_CHECK(k.size(2) == shape.head_dim, "k must have q's head_dim");
  TREEGRPO_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k, v need one dtype");
  TREEGRPO_CHECK(shape.head_dim >= 1 && shape.head_dim <= kMaxDim && shape.value_dim >= 1 && shape.value_dim <= kMaxDim,
                 "head dims must be 1 to 256");
  return shape;
}

inline Shape check_inputs(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                          const torch::stable::Tensor& subtree_end, const torch::stable::Tensor& position) {
  const Shape shape = check_inputs(q, k, v);
  for (const auto* x : {&subtree_end, &position}) {
    TREEGRPO_CHECK(x->dim() == 1 && x->size(0) == shape.num_tokens &&
                       x->scalar_type() == torch::headeronly::ScalarType::Int,
                   "subtree_end and position must be int32 [T]");
  }
  return shape;
}

// No path is longer than T: a window of so many tokens hides none, and the kernels' windows are 32 bits wide.
inline int64_t checked_window(const Shape& shape, int64_t window) {
  TREEGRPO_CHECK(window >= 0, "window must be 0 (none) or positive");
  return window < shape.num_tokens ? window : 0;
}

// The dispatcher looks at the tensors together: one of them on the GPU is enough to call a CUDA kernel.
inline void check_device(const torch::stable::Tensor& q, std::initializer_list<const torch::stable::Tensor*> others) {
  for (const auto* x : others)
    TREEGRPO_CHECK(x->is_cuda() && x->get_device_index() == q.get_device_index(), "all tensors must be on q's CUDA device");
}

#ifdef USE_CUDA
inline void* current_stream(const torch::stable::Tensor& q) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  return stream;
}
#endif

inline void check_sinks(const Shape& shape, const torch::stable::Tensor& sinks) {
  TREEGRPO_CHECK(sinks.dim() == 1 && sinks.size(0) == shape.num_heads, "sinks must be [Hq]");
}

// `compute` is lse's dtype: float64 for float64 inputs, else float32.
inline void check_saved(const Shape& shape, const torch::stable::Tensor& q, const torch::stable::Tensor& dout,
                        const torch::stable::Tensor& out, const torch::stable::Tensor& lse,
                        torch::headeronly::ScalarType compute) {
  for (const auto* x : {&dout, &out}) {
    TREEGRPO_CHECK(x->dim() == 3 && x->size(0) == shape.num_tokens && x->size(1) == shape.num_heads &&
                       x->size(2) == shape.value_dim && x->scalar_type() == q.scalar_type(),
                   "dout and out must be [T, Hq, Dv] in q's dtype");
  }
  TREEGRPO_CHECK(lse.dim() == 2 && lse.size(0) == shape.num_tokens && lse.size(1) == shape.num_heads &&
                     lse.scalar_type() == compute,
                 "lse must be [T, Hq], float32 (float64 for float64 inputs)");
}

}  // namespace treegrpo
