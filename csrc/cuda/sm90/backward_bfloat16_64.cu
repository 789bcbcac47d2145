#include "launch.cuh"

namespace treegrpo::sm90 {

template void backward<64, Half::kBFloat16>(const BackwardCall& call, void* stream);

}  // namespace treegrpo::sm90
