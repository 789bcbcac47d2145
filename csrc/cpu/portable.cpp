// The CPU kernels for whatever the compiler's baseline is (SSE2 on x86-64, NEON on AArch64).
#include "kernels.h"

#define TREEGRPO_VECTOR_BYTES 16

namespace treegrpo::cpu::portable {
#include "simd.h"
#include "layout.h"
#include "forward.h"
#include "backward.h"
}  // namespace treegrpo::cpu::portable
