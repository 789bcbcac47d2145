// The CPU kernels for AVX2 with FMA.
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TREEGRPO_VECTOR_BYTES 32

namespace treegrpo::cpu::avx2 {
#include "simd.h"
#include "layout.h"
#include "forward.h"
#include "backward.h"
}  // namespace treegrpo::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
