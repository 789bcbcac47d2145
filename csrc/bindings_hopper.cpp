// The Hopper kernels (cuda/sm90) as operators of the schema in bindings.cpp. LibTorch stable ABI (torch >= 2.10). Compiled by the
// host compiler, against any torch, CUDA or not. What the tile lists hold stands in treegrpo_kernels/hopper_cuda.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "cuda/sm90/attention.h"

namespace treegrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Calls run<D, type>() for the instance that serves q.
template <template <int, sm90::Half> class Run, class Call>
void dispatch(const Tensor& q, const Call& call, void* stream) {
  const bool is_bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  if (q.size(2) == 64) {
    if (is_bfloat16) Run<64, sm90::Half::kBFloat16>::run(call, stream);
    else Run<64, sm90::Half::kFloat16>::run(call, stream);
  } else {
    if (is_bfloat16) Run<128, sm90::Half::kBFloat16>::run(call, stream);
    else Run<128, sm90::Half::kFloat16>::run(call, stream);
  }
}

template <int D, sm90::Half type>
struct Forward {
  static void run(const sm90::ForwardCall& call, void* stream) { sm90::forward<D, type>(call, stream); }
};
template <int D, sm90::Half type>
struct Backward {
  static void run(const sm90::BackwardCall& call, void* stream) { sm90::backward<D, type>(call, stream); }
};

Shape check_served(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Shape shape = check_inputs(q, k, v);
  TREEGRPO_CHECK((shape.head_dim == 64 || shape.head_dim == 128) && shape.value_dim == shape.head_dim,
                 "the Hopper kernels take head dims of 64 and 128");
  TREEGRPO_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
                 "the Hopper kernels take bfloat16 and float16");
  TREEGRPO_CHECK(shape.num_tokens > 0 && shape.num_tokens < (int64_t{1} << 30), "the Hopper kernels take 1 to 2^30 tokens");
  return shape;
}

sm90::Sizes sizes_of(const Shape& shape) {
  const auto padded = (shape.num_tokens + sm90::kPadding - 1) / sm90::kPadding * sm90::kPadding;
  return {static_cast<int>(shape.num_tokens), static_cast<int>(padded), static_cast<int>(shape.num_heads),
          static_cast<int>(shape.num_kv_heads)};
}

// As TMA can read it, heads packed and rows aligned to 16 bytes; a copy where it is not. The stride of a single token may be
// anything.
Tensor packed(const Tensor& x) {
  const int64_t dim = x.size(2), width = x.size(1) * dim;
  const bool heads_packed = x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == dim);
  const bool rows_apart = x.size(0) > 1 && x.stride(0) >= width && x.stride(0) % 8 == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  if (heads_packed && rows_apart && aligned) return x;
  Tensor copy = torch::stable::new_empty(x, {x.size(0), x.size(1), dim});
  torch::stable::copy_(copy, x);
  return copy;
}

sm90::Matrix matrix(const Tensor& x) { return {x.const_data_ptr(), x.size(0) > 1 ? x.stride(0) : x.size(1) * x.size(2)}; }

const int32_t* integers(const Tensor& q, const Tensor& x) {
  TREEGRPO_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index() && x.scalar_type() == ScalarType::Int &&
                     x.is_contiguous(),
                 "tile lists must be contiguous int32 tensors on q's CUDA device");
  return x.const_data_ptr<int32_t>();
}

std::tuple<Tensor, Tensor> sm90_fwd(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks, Tensor offsets, Tensor indices,
                                    Tensor full, Tensor order, Tensor least, Tensor most, Tensor span, double scale) {
  check_device(q, {&q, &k, &v});
  const Shape shape = check_served(q, k, v);
  const DeviceGuard guard(q.get_device_index());
  q = packed(q), k = packed(k), v = packed(v);
  if (sinks) {
    check_device(q, {&*sinks});
    check_sinks(shape, *sinks);
    sinks = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
  }
  Tensor out = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads, shape.head_dim});
  Tensor lse = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads}, ScalarType::Float);
  const sm90::ForwardCall call{
      sizes_of(shape), matrix(q), matrix(k), matrix(v), sinks ? sinks->const_data_ptr<float>() : nullptr,
      {integers(q, offsets), integers(q, indices), integers(q, full), integers(q, order)},
      {integers(q, least), integers(q, most)}, integers(q, span), static_cast<float>(scale), out.mutable_data_ptr(),
      lse.mutable_data_ptr<float>()};
  dispatch<Forward>(q, call, current_stream(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sm90_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor offsets,
                                            Tensor indices, Tensor full, Tensor order, Tensor least, Tensor most,
                                            Tensor half_least, Tensor half_most, Tensor items, Tensor parted, Tensor span,
                                            double scale, bool deterministic) {
  check_device(q, {&dout, &q, &k, &v, &out, &lse});
  const Shape shape = check_served(q, k, v);
  check_saved(shape, q, dout, out, lse, ScalarType::Float);
  const DeviceGuard guard(q.get_device_index());
  dout = packed(dout), q = packed(q), k = packed(k), v = packed(v), out = packed(out);
  lse = torch::stable::contiguous(lse);
  const sm90::Sizes sizes = sizes_of(shape);
  const auto scratch = [&](int64_t size, bool zeros) {
    return zeros ? torch::stable::new_zeros(q, {size}, ScalarType::Float) : torch::stable::new_empty(q, {size}, ScalarType::Float);
  };
  const int64_t per_head = int64_t{sizes.num_padded} * shape.num_heads, num_key_tiles = least.size(0);
  const int64_t num_slots = items.size(0) - (num_key_tiles - parted.size(0));
  const int64_t partial = num_slots * shape.num_kv_heads * sm90::kPadding * shape.head_dim;
  Tensor lse2 = scratch(per_head, false), delta = scratch(per_head, false);
  Tensor partial_dk = scratch(partial, false), partial_dv = scratch(partial, false);
  Tensor dq_sums = scratch(deterministic ? 0 : per_head * shape.head_dim, true);
  Tensor dq = torch::stable::new_empty(q, {shape.num_tokens, shape.num_heads, shape.head_dim});
  Tensor dk = torch::stable::new_empty(q, {shape.num_tokens, shape.num_kv_heads, shape.head_dim});
  Tensor dv = torch::stable::new_empty(q, {shape.num_tokens, shape.num_kv_heads, shape.head_dim});
  const sm90::BackwardCall call{
      sizes, matrix(dout), matrix(q), matrix(k), matrix(v), matrix(out), lse.const_data_ptr<float>(),
      {integers(q, offsets), integers(q, indices), integers(q, full), integers(q, order)},
      {integers(q, least), integers(q, most)}, {integers(q, half_least), integers(q, half_most)},
      integers(q, items), integers(q, parted), static_cast<int>(items.size(0)), static_cast<int>(parted.size(0)),
      integers(q, span), static_cast<float>(scale), deterministic,
      lse2.mutable_data_ptr<float>(), delta.mutable_data_ptr<float>(),
      partial_dk.mutable_data_ptr<float>(), partial_dv.mutable_data_ptr<float>(), dq_sums.mutable_data_ptr<float>(),
      dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr()};
  dispatch<Backward>(q, call, current_stream(q));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace treegrpo

STABLE_TORCH_LIBRARY_IMPL(treegrpo_native, CUDA, m) {
  m.impl("sm90_fwd", TORCH_BOX(&treegrpo::sm90_fwd));
  m.impl("sm90_bwd", TORCH_BOX(&treegrpo::sm90_bwd));
}
