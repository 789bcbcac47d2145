// The kernels for bfloat16 inputs.
#include "kernels.cuh"

namespace treegrpo::cuda {

template void forward_typed<Type::kBFloat16>(const ForwardCall& call, void* stream);
template void backward_typed<Type::kBFloat16>(const BackwardCall& call, void* stream);

}  // namespace treegrpo::cuda
