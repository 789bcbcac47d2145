#include "launch.cuh"

namespace treegrpo::sm90 {

template void backward<64, Half::kFloat16>(const BackwardCall& call, void* stream);

}  // namespace treegrpo::sm90
