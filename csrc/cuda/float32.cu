// The kernels for float32 inputs.
#include "kernels.cuh"

namespace treegrpo::cuda {

template void forward_typed<Type::kFloat32>(const ForwardCall& call, void* stream);
template void backward_typed<Type::kFloat32>(const BackwardCall& call, void* stream);

}  // namespace treegrpo::cuda
