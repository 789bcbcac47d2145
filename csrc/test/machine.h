// A multiprocessor imitated on one thread, with the interface of cuda/sm90/ptx.cuh: 384 threads as contexts that run in a seeded
// random order, each up to the next thing it waits for; now and then a whole warpgroup stands still while the others go on.
//
// What the hardware does in its own time happens here as early or as late as it may, by the seed: TMA copies arrive in any order
// and no sooner than a later turn; products run when they are queued or only when somebody waits for them, read shared memory and
// registers then, and leave NaN in the accumulators meanwhile. What a thread writes to shared memory reaches TMA and products
// only by a fence. So an early read, a late overwrite, a missing wait or fence shows as a wrong number, and a wrong count of
// arrivals as threads that wait for ever, which is reported. So are registers that a product takes and that were written since
// the thread's last fence, barriers used before they are published, and more registers than a multiprocessor has.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "../cuda/sm90/operands.h"
#include "../cuda/sm90/params.h"
#include "forest.h"
#include "half.h"

namespace treegrpo::test {

using sm90::Major;

// A matrix of 16-bit values that TMA reads and writes in boxes of 64 columns; reads past its end give zeros.
struct TensorMap {
  uint16_t* data = nullptr;
  int num_rows = 0, num_columns = 0, box_rows = 0;
};

class Multiprocessor {
 public:
  static constexpr int kThreads = sm90::kThreads, kGroups = kThreads / sm90::kWarpgroup;
  // of a thread, where one block has the multiprocessor to itself
  static constexpr int kLaunchRegisters = (64 << 10) / kThreads / 8 * 8;

  Multiprocessor(int num_bytes, int block, int num_blocks, unsigned seed)
      : block_(block), num_blocks_(num_blocks), random_(seed), eager_(seed % 3), plain_(num_bytes, 0xff), async_(num_bytes, 0xff) {}

  // Runs body(machine) on every thread of one block.
  template <class Body>
  void run(const Body& body);

  class Thread;

 private:
  struct Barrier {
    int expected = 0, pending = 0, bytes = 0, phase = 0;
  };
  struct Meeting {  // of threads at a named barrier, or of a quad
    int count = 0, turn = 0;
    float values[4], result = 0;
  };
  struct Product {
    sm90::Half type;
    int columns;
    bool add, from_registers;
    Major a_major, b_major;
    uint64_t a, b;
    float* sums[32];
    const uint32_t* registers[32];
  };
  struct Accumulator {
    std::vector<float> sums;
    int thread;
  };
  // The products of one warp: its 16 rows of a warpgroup's 64, for a warp waits for its own alone.
  struct Warp {
    std::deque<Product> queue;         // not yet run
    int first = 0;                     // number of the oldest in the queue
    bool has_results = false;          // that are not written back
    int issued[32] = {}, ended[32] = {}, waited[32] = {};
    std::vector<int> groups;           // products before the end of each group
    std::map<size_t, Meeting> waits;
    std::map<float*, Accumulator> accumulators;  // of products in flight
  };
  struct Store {
    bool add;
    const TensorMap* map;
    float* to;
    uint32_t from;
    int column, row, bytes;
  };
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(96 << 10);
    bool done = false;
    std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // address, word
    bool has_fenced = false;
    std::map<const void*, std::vector<char>> fenced;  // registers of products, as products may take them
    std::vector<Store> stores;
  };

  int uniform(int below) { return static_cast<int>(random_() % below); }
  bool soon() { return eager_ == 0 ? false : eager_ == 1 ? true : uniform(2); }

  template <class Condition>
  void block_until(const Condition& condition) {
    while (!condition()) swapcontext(&fibers_[running_]->context, &scheduler_);
    ++progress_;
  }

  uint8_t* at(std::vector<uint8_t>& memory, uint32_t address, int bytes) {
    EXPECT(address + bytes <= memory.size(), "shared address %u + %d of %zu", address, bytes, memory.size());
    return memory.data() + address;
  }
  static uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

  void complete(Barrier& barrier) {
    EXPECT(barrier.pending >= 0, "more arrivals at a barrier than it expects");
    if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.expected;
  }
  Barrier& barrier(uint32_t address) {
    EXPECT(published_ && barriers_.count(address), "no barrier at %u, or it is not published", address);
    return barriers_[address];
  }

  // What a copy brings, which may arrive when its thread has ended.
  void put(uint32_t to, const void* from, int bytes) {
    std::memcpy(at(plain_, to, bytes), from, bytes);
    std::memcpy(at(async_, to, bytes), from, bytes);
  }
  void arrived(uint32_t address, int bytes) {
    Barrier& known = barrier(address);
    known.bytes -= bytes;
    complete(known);
  }

  // The registers there are as a fence or a product left them.
  static void settle(Fiber& fiber, const void* registers, size_t bytes) {
    const char* now = static_cast<const char*>(registers);
    fiber.fenced[registers].assign(now, now + bytes);
  }

  void meet(Meeting& meeting, int expected, bool wait) {
    const int turn = meeting.turn;
    ++progress_;
    if (++meeting.count == expected) meeting.count = 0, ++meeting.turn;
    if (wait) block_until([&] { return meeting.turn != turn; });
  }

  float operand(const Product& x, uint64_t descriptor, Major major, int outer, int summed) {
    EXPECT(descriptor >> 62 == 1, "a descriptor without the 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
    const uint32_t linear = major == Major::kSummed
                                ? start + outer / 8 * stride + outer % 8 * 128 + summed * 2
                                : start + outer / 64 * leading + summed / 8 * stride + summed % 8 * 128 + outer % 64 * 2;
    uint16_t value;
    std::memcpy(&value, at(async_, swizzle(linear), 2), 2);
    return widen(x.type, value);
  }

  void run_oldest(Warp& warp) {
    const Product x = warp.queue.front();
    warp.queue.pop_front(), ++warp.first, warp.has_results = true;
    float a[64][16], b[128][16];
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < x.columns; ++n) b[n][k] = operand(x, x.b, x.b_major, n, k);
    const int base = static_cast<int>(&warp - products_) % 4 * 32;
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; x.from_registers && i < 8; ++i)
        a[sm90::row_of(base + lane, i)][sm90::column_of(base + lane, i)] =
            widen(x.type, static_cast<uint16_t>(x.registers[lane][i / 2] >> i % 2 * 16));
    for (int k = 0; k < 16; ++k)
      for (int row = base / 2; !x.from_registers && row < base / 2 + 16; ++row) a[row][k] = operand(x, x.a, x.a_major, row, k);
    for (int lane = 0; lane < 32; ++lane) {
      std::vector<float>& sums = warp.accumulators.at(x.sums[lane]).sums;
      for (int i = 0; i < x.columns / 2; ++i) {
        const float *left = a[sm90::row_of(base + lane, i)], *right = b[sm90::column_of(base + lane, i)];
        float sum = x.add ? sums[i] : 0;
        for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
        sums[i] = sum;
      }
    }
  }

  void write_back(Warp& warp) {
    if (!warp.has_results) return;
    warp.has_results = false;
    for (auto it = warp.accumulators.begin(); it != warp.accumulators.end();) {
      bool in_flight = false;
      for (const Product& x : warp.queue)
        for (const float* sums : x.sums) in_flight |= sums == it->first;
      if (in_flight) {
        ++it;
        continue;
      }
      const std::vector<float>& sums = it->second.sums;
      std::copy(sums.begin(), sums.end(), it->first);
      settle(*fibers_[it->second.thread], it->first, sums.size() * sizeof(float));
      it = warp.accumulators.erase(it);
    }
  }

  void carry_out(const Store& x) {
    if (x.add) {
      for (int i = 0; i < x.bytes / 4; ++i) {
        float value;
        std::memcpy(&value, at(async_, x.from + 4 * i, 4), 4);
        x.to[i] += value;
      }
      return;
    }
    for (int r = 0; r < x.map->box_rows; ++r)
      for (int c = 0; c < 64; ++c)
        if (x.row + r < x.map->num_rows && x.column + c < x.map->num_columns)
          std::memcpy(x.map->data + int64_t{x.row + r} * x.map->num_columns + x.column + c,
                      at(async_, swizzle(x.from + r * 128 + c * 2), 2), 2);
  }

  void deliver(bool all) {
    std::shuffle(loads_.begin(), loads_.end(), random_);
    std::vector<std::function<void()>> later;
    for (auto& load : loads_)
      if (all || uniform(2)) load(), ++progress_;
      else later.push_back(std::move(load));
    loads_ = std::move(later);
  }

  static void enter() {
    Multiprocessor& self = *current_;
    (*self.body_)(self.running_);
    self.fibers_[self.running_]->done = true;
    swapcontext(&self.fibers_[self.running_]->context, &self.scheduler_);
  }

  static inline Multiprocessor* current_ = nullptr;
  int block_, num_blocks_;
  std::mt19937 random_;
  int stall_[kThreads / 32 + kGroups] = {};  // turns for which a warp, or a warpgroup, stands still
  int eager_;  // 0: all as late as it may be, 1: as early, 2: by chance
  std::vector<uint8_t> plain_, async_;
  std::map<uint32_t, Barrier> barriers_;
  std::map<int, Meeting> named_;
  Meeting quads_[kThreads / 4], warps_[kThreads / 32];
  Warp products_[kThreads / 32];
  std::vector<std::function<void()>> loads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void(int)>* body_ = nullptr;
  ucontext_t scheduler_;
  int running_ = 0;
  int64_t progress_ = 0;
  bool published_ = false;  // the barriers
  int free_registers_ = 0;  // given back by threads of the block
};

// One thread: the interface of ptx.cuh.
class Multiprocessor::Thread {
 public:
  using Map = TensorMap;
  Thread(Multiprocessor& sm, int index) : sm_(sm), index_(index) {}

  int thread() const { return index_ % sm90::kWarpgroup; }
  int warpgroup() const { return index_ / sm90::kWarpgroup; }
  int block() const { return sm_.block_; }
  int num_blocks() const { return sm_.num_blocks_; }
  uint32_t shared() const { return 0; }

  void init_barrier(uint32_t address, int arrivals) {
    sm_.barriers_[address] = {arrivals, arrivals, 0, 0};
    sm_.published_ = false;
  }
  void publish_barriers() { sm_.published_ = true; }
  void expect(uint32_t address, int bytes) {
    Barrier& barrier = sm_.barrier(address);
    barrier.bytes += bytes, --barrier.pending, ++sm_.progress_;
    sm_.complete(barrier);
  }
  void arrive(uint32_t address) {
    Barrier& barrier = sm_.barrier(address);
    --barrier.pending, ++sm_.progress_;
    sm_.complete(barrier);
  }
  void wait(uint32_t address, int phase) {
    Barrier& barrier = sm_.barrier(address);
    sm_.block_until([&] { return (barrier.phase & 1) != phase; });
  }

  void sync_block() { sm_.meet(sm_.named_[0], kThreads, true); }
  void sync_warp() { sm_.meet(sm_.warps_[index_ / 32], 32, true); }
  void sync_named(int name, int threads) { sm_.meet(sm_.named_[name], threads, true); }
  void arrive_named(int name, int threads) { sm_.meet(sm_.named_[name], threads, false); }
  template <int kRegisters>
  void give_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= kLaunchRegisters);
    sm_.free_registers_ += kLaunchRegisters - kRegisters, ++sm_.progress_;
  }
  template <int kRegisters>
  void take_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= kLaunchRegisters && kRegisters <= 256);
    sm_.block_until([&] { return sm_.free_registers_ >= kRegisters - kLaunchRegisters; });
    sm_.free_registers_ -= kRegisters - kLaunchRegisters;
  }

  void load_box(const Map& map, uint32_t to, int column, int row, uint32_t address) {
    EXPECT(to % 1024 == 0, "a box at %u", to);
    sm_.loads_.push_back([&sm = sm_, &map, to, column, row, address] {
      for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r < map.num_rows && column + c < map.num_columns;
          const uint16_t value = inside ? map.data[int64_t{row + r} * map.num_columns + column + c] : 0;
          sm.put(Multiprocessor::swizzle(to + r * 128 + c * 2), &value, 2);
        }
      sm.arrived(address, map.box_rows * 128);
    });
  }
  void load_bytes(const void* from, uint32_t to, int bytes, uint32_t address) {
    sm_.loads_.push_back([&sm = sm_, from, to, bytes, address] {
      sm.put(to, from, bytes);
      sm.arrived(address, bytes);
    });
  }
  void store_box(const Map& map, uint32_t from, int column, int row) { queue({false, &map, nullptr, from, column, row, 0}); }
  void add_bytes(float* to, uint32_t from, int bytes) { queue({true, nullptr, to, from, 0, 0, bytes}); }
  void end_stores() {
    if (sm_.soon()) wait_stores<0>();
  }
  template <int kLeft>
  void wait_stores() {
    static_assert(kLeft == 0);
    for (const Store& store : fiber().stores) sm_.carry_out(store);
    fiber().stores.clear();
  }
  void fence_async() {
    for (const auto& [address, word] : fiber().unfenced) std::memcpy(sm_.at(sm_.async_, address, 4), &word, 4);
    fiber().unfenced.clear();
  }

  void begin_products() {
    fiber().has_fenced = true;
    for (const auto& [registers, bytes] : fiber().fenced) Multiprocessor::settle(fiber(), registers, bytes.size());
  }
  template <sm90::Half type, int N, Major kA, Major kB>
  void wgmma(float (&sum)[N / 2], uint64_t a, uint64_t b, bool add) {
    issue({type, N, add, false, kA, kB, a, b, {}, {}}, sum, nullptr);
  }
  template <sm90::Half type, int N>
  void wgmma(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    issue({type, N, true, true, Major::kSummed, Major::kOuter, 0, b, {}, {}}, sum, a);
  }
  void end_products() {
    Warp& x = warp();
    const size_t number = ++x.ended[lane()];
    if (x.groups.size() < number) x.groups.push_back(x.issued[lane()]);
    bool everyone = true;
    for (int ended : x.ended) everyone &= ended >= static_cast<int>(number);
    // registers are written back by a wait, never before
    while (everyone && x.first < x.groups[number - 1] && sm_.soon()) sm_.run_oldest(x);
  }
  template <int kLeft, int kSize>
  void wait_products(float (&result)[kSize]) {
    Warp& x = warp();
    const size_t number = ++x.waited[lane()];
    sm_.meet(x.waits[number], 32, true);
    const int last = x.ended[lane()] - kLeft;
    while (last > 0 && x.first < x.groups[last - 1]) sm_.run_oldest(x);
    sm_.write_back(x);
    (void)result;
  }
  template <int kSize>
  void keep(float (&)[kSize]) {}

  float exp2(float x) const { return std::exp2(x); }
  float log2(float x) const { return std::log2(x); }
  float quad_max(float x) {
    return quad(x, [](const float* v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); });
  }
  float quad_sum(float x) {
    return quad(x, [](const float* v) { return (v[0] + v[1]) + (v[2] + v[3]); });
  }
  template <sm90::Half type>
  uint32_t pack(float low, float high) const {
    return narrow(type, low) | uint32_t{narrow(type, high)} << 16;
  }

  template <typename T>
  T read(const T* from) const { return *from; }
  void read(const int32_t* from, int& x, int& y) const { x = from[0], y = from[1]; }
  void write(float* to, float x, float y) { to[0] = x, to[1] = y; }
  template <typename T>
  void load_shared(uint32_t from, T& x, T& y) {
    std::memcpy(&x, sm_.at(sm_.plain_, from, 4), 4);
    std::memcpy(&y, sm_.at(sm_.plain_, from + 4, 4), 4);
  }
  void store_shared(uint32_t to, uint32_t x) {
    std::memcpy(sm_.at(sm_.plain_, to, 4), &x, 4);
    fiber().unfenced.emplace_back(to, x);
  }
  void store_shared(uint32_t to, float x, float y, float z, float w) {
    const float values[] = {x, y, z, w};
    for (int i = 0; i < 4; ++i) {
      uint32_t word;
      std::memcpy(&word, values + i, 4);
      store_shared(to + 4 * i, word);
    }
  }

 private:
  Fiber& fiber() { return *sm_.fibers_[index_]; }
  Warp& warp() { return sm_.products_[index_ / 32]; }
  int lane() const { return index_ % 32; }
  void queue(const Store& store) { fiber().stores.push_back(store); }

  void issue(const Product& product, float* sum, const uint32_t* registers) {
    Warp& x = warp();
    const int number = x.issued[lane()]++ - x.first;
    EXPECT(number >= 0, "a thread is behind a product that ran");
    if (number == static_cast<int>(x.queue.size())) x.queue.push_back(product);
    Product& known = x.queue[number];
    EXPECT(known.a == product.a && known.b == product.b && known.add == product.add, "threads of a warpgroup part ways");
    known.sums[lane()] = sum, known.registers[lane()] = registers;
    if (registers) expect_fenced(registers, 4 * sizeof(uint32_t));
    if (!x.accumulators.count(sum)) {
      expect_fenced(sum, product.columns / 2 * sizeof(float));
      x.accumulators[sum] = {{sum, sum + product.columns / 2}, index_};
      std::fill(sum, sum + product.columns / 2, NAN);
    }
  }

  // Registers that no product has taken before count as fenced, if the thread fenced any.
  void expect_fenced(const void* registers, size_t bytes) {
    EXPECT(fiber().has_fenced, "a product before the first fence of its registers");
    const std::vector<char>& fenced = fiber().fenced[registers];
    if (fenced.size() < bytes) return Multiprocessor::settle(fiber(), registers, bytes);
    EXPECT(std::memcmp(fenced.data(), registers, bytes) == 0, "registers written since the last fence");
  }

  template <class Combine>
  float quad(float x, const Combine& combine) {
    Meeting& quad = sm_.quads_[index_ / 4];
    quad.values[index_ % 4] = x;
    if (quad.count == 3) quad.result = combine(quad.values);
    sm_.meet(quad, 4, true);
    return quad.result;
  }

  Multiprocessor& sm_;
  int index_;
};

template <class Body>
void Multiprocessor::run(const Body& body) {
  const std::function<void(int)> enter_body = [&](int index) {
    Thread thread(*this, index);
    body(thread);
  };
  body_ = &enter_body;
  std::vector<int> order;
  for (int i = 0; i < kThreads; ++i) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Multiprocessor::enter, 0);
    order.push_back(i);
  }
  for (;;) {
    const int64_t before = progress_;
    bool all_done = true, stalled = false;
    std::shuffle(order.begin(), order.end(), random_);
    for (int& rest : stall_) {
      if (rest > 0) --rest;
      else if (uniform(16) == 0) rest = uniform(40);
      stalled |= rest > 0;
    }
    for (int index : order) {
      if (fibers_[index]->done) continue;
      all_done = false, current_ = this, running_ = index;
      if (stall_[index / 32] > 0 || stall_[kThreads / 32 + index / sm90::kWarpgroup] > 0) continue;
      swapcontext(&scheduler_, &fibers_[index]->context);
      progress_ += fibers_[index]->done;
    }
    deliver(progress_ == before);
    if (all_done) break;
    EXPECT(stalled || progress_ != before, "threads wait for ever (block %d)", block_);
  }
  EXPECT(loads_.empty(), "a copy arrives after the end");
  for (auto& fiber : fibers_) EXPECT(fiber->stores.empty(), "shared memory is left before it is stored");
  for (auto& [name, meeting] : named_) EXPECT(meeting.count == 0, "barrier %d is left with arrivals", name);
}

}  // namespace treegrpo::test
