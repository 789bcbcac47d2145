// The CUDA side of the schema in bindings.cpp, which must be loaded first. LibTorch stable ABI (torch >= 2.10). Compiled by the
// host compiler, against any torch, CUDA or not.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "bindings.h"
#include "cuda/attention.h"

namespace treegrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxHeads = 65535;  // heads are on the grid's y

cuda::Type type_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return cuda::Type::kFloat32;
    case ScalarType::Double: return cuda::Type::kFloat64;
    case ScalarType::BFloat16: return cuda::Type::kBFloat16;
    case ScalarType::Half: return cuda::Type::kFloat16;
    default: TREEGRPO_CHECK(false, "the cuda kernel takes float32, float64, bfloat16 and float16");
  }
}

// What is summed in, and lse's dtype.
ScalarType compute_of(cuda::Type type) {
  return type == cuda::Type::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void check_limits(const Shape& shape) {
  TREEGRPO_CHECK(shape.num_heads >= 1 && shape.num_heads <= kMaxHeads, "the cuda kernel takes 1 to 65535 query heads");
}

// Strides as they are if rows are dense, else a contiguous copy.
Tensor dense_rows(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

cuda::View view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

void forward(cuda::Type type, const cuda::ForwardCall& call, void* stream) {
  switch (type) {
    case cuda::Type::kFloat32: return cuda::forward_typed<cuda::Type::kFloat32>(call, stream);
    case cuda::Type::kFloat64: return cuda::forward_typed<cuda::Type::kFloat64>(call, stream);
    case cuda::Type::kBFloat16: return cuda::forward_typed<cuda::Type::kBFloat16>(call, stream);
    case cuda::Type::kFloat16: return cuda::forward_typed<cuda::Type::kFloat16>(call, stream);
  }
}

void backward(cuda::Type type, const cuda::BackwardCall& call, void* stream) {
  switch (type) {
    case cuda::Type::kFloat32: return cuda::backward_typed<cuda::Type::kFloat32>(call, stream);
    case cuda::Type::kFloat64: return cuda::backward_typed<cuda::Type::kFloat64>(call, stream);
    case cuda::Type::kBFloat16: return cuda::backward_typed<cuda::Type::kBFloat16>(call, stream);
    case cuda::Type::kFloat16: return cuda::backward_typed<cuda::Type::kFloat16>(call, stream);
  }
}

std::tuple<Tensor, Tensor> attn_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks, Tensor subtree_end,
                                    Tensor position, double scale, int64_t window, double softcap) {
  check_device(q, {&q, &k, &v, &subtree_end, &position});
  const cuda::Type type = type_of(q);
  const Shape shape = check_inputs(q, k, v, subtree_end, position);
  check_limits(shape);
  const DeviceGuard guard(q.get_device_index());
  q = dense_rows(q), k = dense_rows(k), v = dense_rows(v);
  subtree_end = torch::stable::contiguous(subtree_end), position = torch::stable::contiguous(position);
  if (sinks) {
    check_device(q, {&*sinks});
    check_sinks(shape, *sinks);
    sinks = torch::stable::contiguous(torch::stable::to(*sinks, compute_of(type)));
  }
  Tensor out = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads, shape.value_dim});
  Tensor lse = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads}, compute_of(type));
  if (shape.num_tokens) {
    forward(type,
            {shape,
             {subtree_end.const_data_ptr<int32_t>(), position.const_data_ptr<int32_t>(), checked_window(shape, window)},
             {scale, softcap},
             view(q),
             view(k),
             view(v),
             sinks ? sinks->const_data_ptr() : nullptr,
             out.mutable_data_ptr(),
             lse.mutable_data_ptr()},
            current_stream(q));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            Tensor subtree_end, Tensor position, double scale, int64_t window,
                                            double softcap) {
  check_device(q, {&dout, &q, &k, &v, &out, &lse, &subtree_end, &position});
  const cuda::Type type = type_of(q);
  const Shape shape = check_inputs(q, k, v, subtree_end, position);
  check_limits(shape);
  check_saved(shape, q, dout, out, lse, compute_of(type));
  const DeviceGuard guard(q.get_device_index());
  dout = dense_rows(dout), q = dense_rows(q), k = dense_rows(k), v = dense_rows(v), out = dense_rows(out);
  lse = torch::stable::contiguous(lse);
  subtree_end = torch::stable::contiguous(subtree_end), position = torch::stable::contiguous(position);
  Tensor delta = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads}, compute_of(type));
  Tensor dq = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads, shape.head_dim});
  Tensor dk = torch::stable::new_empty(q, {shape.num_tokens, shape.num_kv_heads, shape.head_dim});
  Tensor dv = torch::stable::new_empty(q, {shape.num_tokens, shape.num_kv_heads, shape.value_dim});
  if (shape.num_tokens) {
    backward(type,
             {shape,
              {subtree_end.const_data_ptr<int32_t>(), position.const_data_ptr<int32_t>(), checked_window(shape, window)},
              {scale, softcap},
              view(dout),
              view(q),
              view(k),
              view(v),
              view(out),
              lse.const_data_ptr(),
              delta.mutable_data_ptr(),
              dq.mutable_data_ptr(),
              dk.mutable_data_ptr(),
              dv.mutable_data_ptr()},
             current_stream(q));
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace treegrpo

STABLE_TORCH_LIBRARY_IMPL(treegrpo_native, CUDA, m) {
  m.impl("attn_fwd", TORCH_BOX(&treegrpo::attn_fwd));
  m.impl("attn_bwd", TORCH_BOX(&treegrpo::attn_bwd));
}

// Makes the object importable; the operators register themselves when it is loaded.
extern "C" PyObject* PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
