// Marks for functions that run on the GPU and, for the unit tests, on the host.
#pragma once

#if defined(__CUDACC__)
#define TREEGRPO_HD __host__ __device__ __forceinline__
#define TREEGRPO_DEVICE __device__ __forceinline__
#define TREEGRPO_UNROLL _Pragma("unroll")
#else
#define TREEGRPO_HD inline
#define TREEGRPO_DEVICE inline
#define TREEGRPO_UNROLL
#endif
