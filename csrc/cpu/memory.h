// Scratch memory of the CPU kernels. What a call gives back is kept for the next one: fresh pages of packed operands cost
// up to a tenth of a call, for the system clears them.
#pragma once

#include <cstdint>

namespace treegrpo::cpu {

// At least `bytes` bytes on a cache line, uninitialised; throws std::bad_alloc. Thread-safe.
void* take_memory(int64_t bytes);
void give_memory(void* memory);

}  // namespace treegrpo::cpu
