// A warp imitated on one thread: 32 lanes as contexts that run in turn, each up to the next sum over the group. Lanes that part
// ways (one ends, or runs on, while another waits for a sum) are reported: on a GPU they would hang or mix their values.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <functional>
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
      state.done = false, state.num_sums = 0;
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
    }
  }

  // What __shfl_xor_sync adds up, step by step, so that rounding is the same.
  template <typename S>
  S sum(int lane, S x) {
    State& state = states_[lane];
    // a lane may be one sum ahead of another, never two
    const int slot = state.num_sums++ % 2;
    state.value[slot] = x;
    swapcontext(&state.context, &scheduler_);
    S all[kLanes], next[kLanes];
    for (int l = 0; l < kLanes; ++l) all[l] = static_cast<S>(states_[l].value[slot]);
    for (int step = kLanes / 2; step > 0; step /= 2) {
      for (int l = 0; l < kLanes; ++l) next[l] = all[l] + all[l ^ step];
      std::copy(next, next + kLanes, all);
    }
    return all[lane];
  }

 private:
  struct State {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    double value[2] = {};
    int num_sums = 0;
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
