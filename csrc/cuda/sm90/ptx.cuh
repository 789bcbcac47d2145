// The GPU as the kernels see it: one PTX instruction a function, in the words of forward.h and backward_*.h. The unit tests have
// the same interface as an imitation (test/machine.h). Source: PTX ISA 8.x, sections named beside each group.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "operands.h"
#include "params.h"

namespace treegrpo::sm90 {

struct Gpu {
  using Map = CUtensorMap;

  // places
  __device__ __forceinline__ int thread() const { return threadIdx.x % kWarpgroup; }
  // from lane 0, so that the compiler knows it to be the same in all lanes
  __device__ __forceinline__ int warpgroup() const { return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0); }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int num_blocks() const { return gridDim.x; }
  __device__ __forceinline__ uint32_t shared() const {
    extern __shared__ __align__(1024) unsigned char memory[];
    const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    // swizzles go by the address, and operands.h by the place in the tile
    if (base % kAtomBytes) __trap();
    return base;
  }

  // mbarriers
  __device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
  __device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t barrier, int phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(phase) : "memory");
  }

  // barriers of threads
  __device__ __forceinline__ void sync_block() { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  __device__ __forceinline__ void sync_named(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
  }
  __device__ __forceinline__ void arrive_named(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
  }

  // registers of a warpgroup
  template <int kRegisters>
  __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
  template <int kRegisters>
  __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }

  // TMA
  __device__ __forceinline__ void load_box(const Map& map, uint32_t to, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
  }
  __device__ __forceinline__ void store_box(const Map& map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row),
                 "r"(from)
                 : "memory");
  }
  __device__ __forceinline__ void load_bytes(const void* from, uint32_t to, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
  }
  __device__ __forceinline__ void add_bytes(float* to, uint32_t from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void end_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
  // Until all but the newest kLeft groups of this thread have read what they store.
  template <int kLeft>
  __device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
  }
  // What this thread wrote to shared memory is seen by TMA and wgmma afterwards.
  __device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  // wgmma
  __device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  __device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Until all but the newest kLeft groups are done; `result` is theirs.
  template <int kLeft, int kSize>
  __device__ __forceinline__ void wait_products(float (&result)[kSize]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
    keep(result);
  }
  // The values are those of now: no use of them moves above.
  template <int kSize>
  __device__ __forceinline__ void keep(float (&x)[kSize]) {
#pragma unroll
    for (float& value : x) asm volatile("" : "+f"(value)::"memory");
  }

  // The lists of accumulators, as text and as operands, and the two forms of the instruction with them.
#define TREEGRPO_R8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define TREEGRPO_R32                                                                            \
  TREEGRPO_R8(0, 1, 2, 3, 4, 5, 6, 7) ", " TREEGRPO_R8(8, 9, 10, 11, 12, 13, 14, 15) ", "       \
  TREEGRPO_R8(16, 17, 18, 19, 20, 21, 22, 23) ", " TREEGRPO_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define TREEGRPO_R64                                                                            \
  TREEGRPO_R32 ", " TREEGRPO_R8(32, 33, 34, 35, 36, 37, 38, 39) ", "                            \
  TREEGRPO_R8(40, 41, 42, 43, 44, 45, 46, 47) ", " TREEGRPO_R8(48, 49, 50, 51, 52, 53, 54, 55)  \
  ", " TREEGRPO_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define TREEGRPO_F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define TREEGRPO_F16(x, i) TREEGRPO_F4(x, i), TREEGRPO_F4(x, i + 4), TREEGRPO_F4(x, i + 8), TREEGRPO_F4(x, i + 12)
#define TREEGRPO_F32(x) TREEGRPO_F16(x, 0), TREEGRPO_F16(x, 16)
#define TREEGRPO_F64(x) TREEGRPO_F32(x), TREEGRPO_F16(x, 32), TREEGRPO_F16(x, 48)
// operands after the accumulators: a, b, add, and whether a and b lie along the outer dimension
#define TREEGRPO_SHARED(N, dtype, registers, outputs, a, b, add, outer_a, outer_b)                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add ", 0;\n"                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." dtype "." dtype " {" registers "}, %" #a ", %" #b         \
               ", add, 1, 1, %" #outer_a ", %" #outer_b ";\n}\n"                                                          \
               : outputs(sum)                                                                                             \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(add_to)), "n"(kA == Major::kOuter), "n"(kB == Major::kOuter))
#define TREEGRPO_REGISTERS(N, dtype, registers, outputs, a0, a1, a2, a3, b)                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." dtype "." dtype " {" registers "}, {%" #a0 ", %" #a1       \
               ", %" #a2 ", %" #a3 "}, %" #b ", 1, 1, 1, 1;\n"                                                            \
               : outputs(sum)                                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor))

  // sum [64, N] = (or += with add_to) a [64, 16] b [N, 16]^T, both in shared memory.
  template <Half type, int N, Major kA, Major kB>
  __device__ __forceinline__ void wgmma(float (&sum)[N / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool add_to) {
    static_assert(N == 64 || N == 128);
    constexpr bool kBFloat16 = type == Half::kBFloat16;
    if constexpr (N == 64 && kBFloat16) TREEGRPO_SHARED(64, "bf16", TREEGRPO_R32, TREEGRPO_F32, 32, 33, 34, 35, 36);
    else if constexpr (N == 64) TREEGRPO_SHARED(64, "f16", TREEGRPO_R32, TREEGRPO_F32, 32, 33, 34, 35, 36);
    else if constexpr (kBFloat16) TREEGRPO_SHARED(128, "bf16", TREEGRPO_R64, TREEGRPO_F64, 64, 65, 66, 67, 68);
    else TREEGRPO_SHARED(128, "f16", TREEGRPO_R64, TREEGRPO_F64, 64, 65, 66, 67, 68);
  }
  // sum [64, N] += a [64, 16] b [16, N], a in registers, b in shared memory with its rows along N.
  template <Half type, int N>
  __device__ __forceinline__ void wgmma(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b_descriptor) {
    static_assert(N == 64 || N == 128);
    constexpr bool kBFloat16 = type == Half::kBFloat16;
    if constexpr (N == 64 && kBFloat16) TREEGRPO_REGISTERS(64, "bf16", TREEGRPO_R32, TREEGRPO_F32, 32, 33, 34, 35, 36);
    else if constexpr (N == 64) TREEGRPO_REGISTERS(64, "f16", TREEGRPO_R32, TREEGRPO_F32, 32, 33, 34, 35, 36);
    else if constexpr (kBFloat16) TREEGRPO_REGISTERS(128, "bf16", TREEGRPO_R64, TREEGRPO_F64, 64, 65, 66, 67, 68);
    else TREEGRPO_REGISTERS(128, "f16", TREEGRPO_R64, TREEGRPO_F64, 64, 65, 66, 67, 68);
  }

  // values
  __device__ __forceinline__ float exp2(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ float log2(float x) const { return __log2f(x); }
  // Over the four threads that share a row of a result.
  __device__ __forceinline__ float quad_max(float x) const {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
  __device__ __forceinline__ float quad_sum(float x) const {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
  // Two values rounded to the type, `low` in the lower half.
  template <Half type>
  __device__ __forceinline__ uint32_t pack(float low, float high) const {
    uint32_t both;
    if constexpr (type == Half::kBFloat16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }

  // memory
  template <typename T>
  __device__ __forceinline__ T read(const T* from) const { return __ldg(from); }
  __device__ __forceinline__ void read(const int32_t* from, int& x, int& y) const {
    const int2 both = __ldg(reinterpret_cast<const int2*>(from));
    x = both.x, y = both.y;
  }
  __device__ __forceinline__ void write(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = {x, y}; }
  __device__ __forceinline__ void load_shared(uint32_t from, float& x, float& y) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(from) : "memory");
  }
  __device__ __forceinline__ void load_shared(uint32_t from, int& x, int& y) {
    asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(from) : "memory");
  }
  __device__ __forceinline__ void store_shared(uint32_t to, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
  }
  __device__ __forceinline__ void store_shared(uint32_t to, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
  }
};

#undef TREEGRPO_R8
#undef TREEGRPO_R32
#undef TREEGRPO_R64
#undef TREEGRPO_F4
#undef TREEGRPO_F16
#undef TREEGRPO_F32
#undef TREEGRPO_F64
#undef TREEGRPO_SHARED
#undef TREEGRPO_REGISTERS

}  // namespace treegrpo::sm90
