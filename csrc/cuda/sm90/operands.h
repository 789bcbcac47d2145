// Where the elements of a tile lie: in shared memory, in a thread's registers, and in the words that describe them to wgmma.
//
// A tile [rows, D] of 16-bit elements is stored as D / 64 panels [rows, 64]. A row of a panel is 128 bytes, in which the eight
// pieces of 16 bytes are exchanged by the row's number: the 128-byte swizzle of TMA and wgmma, which keeps columns of a tile
// free of bank conflicts. Panels start at multiples of 1,024 bytes. Source: PTX ISA, "Asynchronous warpgroup level matrix
// shared memory layout" and "Register fragments for wgmma.mma_async.m64nNk16".
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace treegrpo::sm90 {

constexpr int kWarpgroup = 128;    // threads
constexpr int kPanelColumns = 64;  // of 16 bits
constexpr int kRowBytes = 128;
constexpr int kAtomBytes = 1024;  // eight rows: what repeats
constexpr int kDepth = 16;        // elements of the summed dimension that one wgmma takes

constexpr TREEGRPO_HD int panel_bytes(int rows) { return rows * kRowBytes; }
constexpr TREEGRPO_HD int tile_bytes(int rows, int columns) { return columns / kPanelColumns * panel_bytes(rows); }

// Byte of an element within its panel; `byte` is the element's place in the row.
TREEGRPO_HD uint32_t swizzled(uint32_t row, uint32_t byte) { return row * kRowBytes + (byte ^ (row & 7) << 4); }

// How a panel is read: the summed dimension along its rows' 128 bytes, or along the rows.
enum class Major { kSummed, kOuter };

// The matrix that begins at `address` of shared memory; `panel` bytes lie between its panels, which matters for kOuter only.
TREEGRPO_HD uint64_t descriptor(uint32_t address, Major major, int panel) {
  const uint64_t leading = major == Major::kOuter ? panel : 16;
  return uint64_t{1} << 62 | uint64_t{kAtomBytes >> 4} << 32 | (leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Bytes from one step of the summed dimension to the next; for kSummed within a panel, which holds four steps.
constexpr TREEGRPO_HD int step_bytes(Major major) { return major == Major::kSummed ? 2 * kDepth : kDepth * kRowBytes; }

// Offset of step `step` of the summed dimension; `panel` bytes lie between panels.
constexpr TREEGRPO_HD int step_offset(Major major, int step, int panel) {
  constexpr int kSteps = kPanelColumns / kDepth;
  return major == Major::kSummed ? step / kSteps * panel + step % kSteps * step_bytes(major) : step * step_bytes(major);
}

// Accumulator i of a thread of the warpgroup, in a result [64, N]: two rows a thread, pairs of neighbouring columns.
TREEGRPO_HD int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8; }
TREEGRPO_HD int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace treegrpo::sm90
