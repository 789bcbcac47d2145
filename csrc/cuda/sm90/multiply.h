// Products of tiles by wgmma, and the packing of results into operands. Machine is the GPU (ptx.cuh) or its imitation in the unit
// tests; all of its 128-thread operations are called by whole warpgroups.
#pragma once

#include <math.h>

#include "operands.h"
#include "params.h"

namespace treegrpo::sm90 {

// A tile in shared memory, as one side of a product.
struct Operand {
  uint32_t address;
  int panel;  // bytes between panels
  Major major;

  TREEGRPO_HD uint64_t step(int step) const { return descriptor(address + step_offset(major, step, panel), major, panel); }
};

// sum [64, N] = (or += with `add`) a [64, K] b [N, K]^T. Queued: results are there after a wait.
template <Half type, int N, int K, Major kA, Major kB, class Machine>
TREEGRPO_DEVICE void multiply(Machine& m, float (&sum)[N / 2], uint32_t a, int a_panel, uint32_t b, int b_panel, bool add) {
  TREEGRPO_UNROLL
  for (int step = 0; step < K / kDepth; ++step)
    m.template wgmma<type, N, kA, kB>(sum, Operand{a, a_panel, kA}.step(step), Operand{b, b_panel, kB}.step(step), add || step > 0);
}

// sum [64, N] += a [64, K] b [K, N], a in registers. Queued, and `a` is read until a wait.
template <Half type, int N, int K, class Machine>
TREEGRPO_DEVICE void multiply(Machine& m, float (&sum)[N / 2], uint32_t (&a)[K / kDepth][4], uint32_t b, int b_panel) {
  TREEGRPO_UNROLL
  for (int step = 0; step < K / kDepth; ++step)
    m.template wgmma<type, N>(sum, a[step], Operand{b, b_panel, Major::kOuter}.step(step));
}

// A result [64, K] rounded to the operand of the next product: accumulators lie as the operand's registers do.
template <Half type, int K, class Machine>
TREEGRPO_DEVICE void pack(Machine& m, const float (&x)[K / 2], uint32_t (&operand)[K / kDepth][4]) {
  TREEGRPO_UNROLL
  for (int i = 0; i < K / 4; ++i) operand[i / 4][i % 4] = m.template pack<type>(x[2 * i], x[2 * i + 1]);
}

// Lays an operand [64, K] into panels of shared memory, `panel` bytes apart, beginning at row `row` of each.
template <int K, class Machine>
TREEGRPO_DEVICE void store(Machine& m, const uint32_t (&operand)[K / kDepth][4], uint32_t address, int panel, int row) {
  TREEGRPO_UNROLL
  for (int i = 0; i < K / 4; ++i) {
    const int column = column_of(m.thread(), 2 * i);
    const uint32_t at = swizzled(row + row_of(m.thread(), 2 * i), column % kPanelColumns * 2);
    m.store_shared(address + column / kPanelColumns * panel + at, operand[i / 4][i % 4]);
  }
}

// Rounds a result [64, N] and lays it likewise.
template <Half type, int N, class Machine>
TREEGRPO_DEVICE void store(Machine& m, const float (&x)[N / 2], uint32_t address, int panel, int row) {
  uint32_t operand[N / kDepth][4];
  pack<type, N>(m, x, operand);
  store<N>(m, operand, address, panel, row);
}

// span of the keys of this thread's columns of a result [64, N]: two neighbours in each group of eight.
template <int N, class Machine>
TREEGRPO_DEVICE void read_spans(Machine& m, const int32_t* span, int (&spans)[N / 4]) {
  TREEGRPO_UNROLL
  for (int i = 0; i < N / 4; i += 2) m.read(span + column_of(m.thread(), 2 * i), spans[i], spans[i + 1]);
}

// Loads a tile [rows, D] from row `row`, column `column` of a matrix; completes `bytes` of the barrier.
template <int D, class Machine, class Map>
TREEGRPO_DEVICE void load(Machine& m, const Map& from, uint32_t to, int panel, int row, int column, uint32_t barrier) {
  TREEGRPO_UNROLL
  for (int p = 0; p < D / kPanelColumns; ++p)
    m.load_box(from, to + p * panel, column + p * kPanelColumns, row, barrier);
}

// Stores a tile [rows, D] of shared memory; rows past the matrix's end are left out.
template <int D, class Machine, class Map>
TREEGRPO_DEVICE void store(Machine& m, const Map& to, uint32_t from, int panel, int row, int column) {
  TREEGRPO_UNROLL
  for (int p = 0; p < D / kPanelColumns; ++p) m.store_box(to, from + p * panel, column + p * kPanelColumns, row);
}

// One barrier for the buffers of a ring being full, one for their being free. Each warp that reads says so by itself.
constexpr int kWarpsPerGroup = kWarpgroup / 32;
template <class Machine>
TREEGRPO_DEVICE void release(Machine& m, uint32_t barrier) {
  if (m.thread() % 32 == 0) m.arrive(barrier);
}

}  // namespace treegrpo::sm90
