// A warp imitated on one thread: 32 lanes as contexts that run in turn, each up to the next sum over the group. Lanes that part
// ways (one ends, or runs on, while another waits for a sum) are reported: on a GPU they would hang or mix their values.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#include "forest.h"

namespace treegrpo::test {

class Warp {
 public:
  static constexpr int kLanes = 32;

  // Runs body(lane) on every lane.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    for (int lane = 0; lane < kLanes; ++lane) {
      State& state = states_[lane];
      state.done = false;
      getcontext(&state.context);
      state.context.uc_stack = {state.stack.data(), 0, state.stack.size()};
      state.context.uc_link = &scheduler_;
      makecontext(&state.context, &Warp::enter, 0);
    }
    for (;;) {
      int done = 0;
      for (lane_ = 0; lane_ < kLanes; ++lane_) {
        current_ = this;
        swapcontext(&scheduler_, &states_[lane_].context);
        done += states_[lane_].done;
      }
      if (done == kLanes) return;
      EXPECT(done == 0, "%d lanes ended while the others wait for a sum", done);
      ++sums;
    }
  }

  // What __shfl_xor_sync adds up, step by step, so that rounding is the same.
  template <typename S>
  S sum(int lane, S x) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
      states_[lane].value = x;
      swapcontext(&states_[lane].context, &scheduler_);
      x += static_cast<S>(states_[lane ^ step].value);
      // nobody may write its next value before all have read this one
      swapcontext(&states_[lane].context, &scheduler_);
    }
    return x;
  }

  int64_t sums = 0;

 private:
  struct State {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    double value = 0;
    bool done = false;
  };

  static void enter() {
    Warp* warp = current_;
    const int lane = warp->lane_;
    (*warp->body_)(lane);
    warp->states_[lane].done = true;
  }

  std::vector<State> states_ = std::vector<State>(kLanes);
  ucontext_t scheduler_;
  const std::function<void(int)>* body_ = nullptr;
  int lane_ = 0;
  static inline Warp* current_ = nullptr;
};

}  // namespace treegrpo::test
