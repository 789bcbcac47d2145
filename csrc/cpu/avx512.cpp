// The CPU kernels for AVX-512.
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define TREEGRPO_VECTOR_BYTES 64

namespace treegrpo::cpu::avx512 {
#include "simd.h"
#include "layout.h"
#include "forward.h"
#include "backward.h"
}  // namespace treegrpo::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
