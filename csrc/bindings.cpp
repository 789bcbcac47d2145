// Where torch ends, with bindings.h and bindings_cuda.cpp: schema, checks, and the step from tensors to params. LibTorch
// stable ABI (torch >= 2.10).
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "bindings.h"
#include "check.h"
#include "cpu/attention.h"
#include "params.h"

namespace treegrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::Double: return Type::kFloat64;
    case ScalarType::BFloat16: return Type::kBFloat16;
    default: TREEGRPO_CHECK(false, "the cpu kernel takes float32, float64 and bfloat16");
  }
}

// torch's own thread pool; an exception of a worker is thrown here, not inside the pool.
void run_parallel(int64_t num_workers, const std::function<void(int64_t)>& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        body(worker);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

std::tuple<Tensor, Tensor> attn_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks, Tensor subtree_end,
                                    Tensor position, double scale, int64_t window, double softcap) {
  const Type type = type_of(q);
  const Shape shape = check_inputs(q, k, v, subtree_end, position);
  q = torch::stable::contiguous(q), k = torch::stable::contiguous(k), v = torch::stable::contiguous(v);
  subtree_end = torch::stable::contiguous(subtree_end), position = torch::stable::contiguous(position);
  Tensor out = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads, shape.value_dim});
  Tensor lse = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads},
                                        type == Type::kFloat64 ? ScalarType::Double : ScalarType::Float);
  std::optional<Tensor> sinks_float;
  if (sinks) {
    check_sinks(shape, *sinks);
    sinks_float = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Double));
  }
  cpu::forward({type,
                shape,
                {subtree_end.const_data_ptr<int32_t>(), position.const_data_ptr<int32_t>(), checked_window(shape, window)},
                {scale, softcap},
                q.const_data_ptr(),
                k.const_data_ptr(),
                v.const_data_ptr(),
                sinks_float ? sinks_float->const_data_ptr<double>() : nullptr,
                out.mutable_data_ptr(),
                lse.mutable_data_ptr(),
                torch::stable::get_num_threads(),
                run_parallel});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            Tensor subtree_end, Tensor position, double scale, int64_t window,
                                            double softcap) {
  const Type type = type_of(q);
  const Shape shape = check_inputs(q, k, v, subtree_end, position);
  check_saved(shape, q, dout, out, lse, type == Type::kFloat64 ? ScalarType::Double : ScalarType::Float);
  q = torch::stable::contiguous(q), k = torch::stable::contiguous(k), v = torch::stable::contiguous(v);
  dout = torch::stable::contiguous(dout), out = torch::stable::contiguous(out), lse = torch::stable::contiguous(lse);
  subtree_end = torch::stable::contiguous(subtree_end), position = torch::stable::contiguous(position);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  cpu::backward({type,
                 shape,
                 {subtree_end.const_data_ptr<int32_t>(), position.const_data_ptr<int32_t>(), checked_window(shape, window)},
                 {scale, softcap},
                 dout.const_data_ptr(),
                 q.const_data_ptr(),
                 k.const_data_ptr(),
                 v.const_data_ptr(),
                 out.const_data_ptr(),
                 lse.const_data_ptr(),
                 dq.mutable_data_ptr(),
                 dk.mutable_data_ptr(),
                 dv.mutable_data_ptr(),
                 torch::stable::get_num_threads(),
                 run_parallel});
  return {dq, dk, dv};
}

std::string isa() { return cpu::isa(); }
void set_isa(std::string name) { cpu::set_isa(name); }

}  // namespace
}  // namespace treegrpo

STABLE_TORCH_LIBRARY(treegrpo_native, m) {
  m.def(
      "attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor subtree_end, Tensor position, float scale, int window,"
      " float softcap) -> (Tensor out, Tensor lse)");
  m.def(
      "attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor subtree_end, Tensor position,"
      " float scale, int window, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)");
  // Hopper; tile lists as in treegrpo_kernels/hopper_cuda.py
  m.def(
      "sm90_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor offsets, Tensor indices, Tensor full, Tensor order,"
      " Tensor least, Tensor most, Tensor span, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "sm90_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor offsets, Tensor indices,"
      " Tensor full, Tensor order, Tensor least, Tensor most, Tensor half_least, Tensor half_most, Tensor items, Tensor parted,"
      " Tensor span, float scale, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(treegrpo_native, CPU, m) {
  m.impl("attn_fwd", TORCH_BOX(&treegrpo::attn_fwd));
  m.impl("attn_bwd", TORCH_BOX(&treegrpo::attn_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(treegrpo_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&treegrpo::isa));
  m.impl("set_isa", TORCH_BOX(&treegrpo::set_isa));
}

// Makes the object importable; the operators register themselves when it is loaded.
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
