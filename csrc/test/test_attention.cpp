// The CPU kernels, every instruction set of this machine, against attention written out pair by pair in double.
#include "cpu/attention.h"

#include <stdexcept>
#include <thread>

#include "definition.h"

using namespace treegrpo;
using namespace treegrpo::test;

static void threads(int64_t num_workers, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> pool;
  for (int64_t worker = 0; worker < num_workers; ++worker) pool.emplace_back(body, worker);
  for (std::thread& thread : pool) thread.join();
}

static void by_kernel(const Forest& forest, const Problem& p, Tensors& x) {
  const Mask mask{forest.subtree_end.data(), forest.position.data(), p.window};
  const double* sinks = p.has_sinks ? x.sinks.data() : nullptr;
  cpu::forward({Type::kFloat64, p.shape, mask, p.score, x.q.data(), x.k.data(), x.v.data(), sinks, x.out.data(),
                x.lse.data(), 3, threads});
  cpu::backward({Type::kFloat64, p.shape, mask, p.score, x.dout.data(), x.q.data(), x.k.data(), x.v.data(), x.out.data(),
                 x.lse.data(), x.dq.data(), x.dk.data(), x.dv.data(), 3, threads});
}

int main() {
  const Problem problems[] = {
      {{150, 2, 2, 8, 8}, {0.35, 0}, 0, false},
      {{203, 4, 1, 5, 11}, {0.5, 0}, 0, true},
      {{300, 2, 1, 16, 3}, {0.3, 2.0}, 17, true},
      {{97, 1, 1, 33, 33}, {-0.2, 0}, 1, false},
  };
  int runs = 0;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    try {
      cpu::set_isa(isa);
    } catch (const std::invalid_argument&) {
      continue;
    }
    unsigned seed = 0;
    for (const Problem& p : problems)
      for (double branch : {0.02, 0.3}) {
        const Forest forest = test::random_forest(p.shape.num_tokens, ++seed, branch);
        Tensors expected = inputs(p, seed), found = inputs(p, seed);
        by_definition(forest, p, expected);
        by_kernel(forest, p, found);
        compare("out", found.out, expected.out);
        compare("lse", found.lse, expected.lse);
        compare("dq", found.dq, expected.dq);
        compare("dk", found.dk, expected.dk);
        compare("dv", found.dv, expected.dv);
        ++runs;
      }
  }
  std::printf("attention: %d runs ok, best instruction set %s\n", runs, (cpu::set_isa(""), cpu::isa()));
}
