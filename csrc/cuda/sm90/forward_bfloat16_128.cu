#include "launch.cuh"

namespace treegrpo::sm90 {

template void forward<128, Half::kBFloat16>(const ForwardCall& call, void* stream);

}  // namespace treegrpo::sm90
