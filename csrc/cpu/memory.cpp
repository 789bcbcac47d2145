#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace treegrpo::cpu {
namespace {

constexpr int64_t kKeptBytes = int64_t{256} << 20;  // of blocks nobody uses at the moment
constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kCacheLine = 64;

struct Block {
  void* memory;
  int64_t bytes;
};

struct Store {
  std::mutex mutex;
  std::vector<Block> lent, kept;  // kept: oldest first
  int64_t kept_bytes = 0;
};

// never destroyed: a thread may still give memory back while the process ends
Store& store() {
  static Store& one = *new Store;
  return one;
}

void* fresh(int64_t bytes, int64_t align) {
  void* memory = std::aligned_alloc(align, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (align == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

void* take_memory(int64_t bytes) {
  const int64_t align = bytes >= kHugePage ? kHugePage : kCacheLine;
  bytes = (bytes + align) / align * align;
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.lent.reserve(s.lent.size() + 1);
  size_t best = s.kept.size();
  // the smallest that fits without wasting more than half
  for (size_t i = 0; i < s.kept.size(); ++i)
    if (s.kept[i].bytes >= bytes && s.kept[i].bytes <= 2 * bytes &&
        (best == s.kept.size() || s.kept[i].bytes < s.kept[best].bytes))
      best = i;
  Block block;
  if (best < s.kept.size()) {
    block = s.kept[best];
    s.kept.erase(s.kept.begin() + best);
    s.kept_bytes -= block.bytes;
  } else {
    block = {fresh(bytes, align), bytes};
  }
  s.lent.push_back(block);
  return block.memory;
}

void give_memory(void* memory) {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  size_t at = 0;
  while (s.lent[at].memory != memory) ++at;
  s.kept.push_back(s.lent[at]);
  s.kept_bytes += s.lent[at].bytes;
  s.lent.erase(s.lent.begin() + at);
  while (s.kept_bytes > kKeptBytes) {
    s.kept_bytes -= s.kept.front().bytes;
    std::free(s.kept.front().memory);
    s.kept.erase(s.kept.begin());
  }
}

}  // namespace treegrpo::cpu
