#include "launch.cuh"

namespace treegrpo::sm90 {

template void forward<64, Half::kFloat16>(const ForwardCall& call, void* stream);

}  // namespace treegrpo::sm90
