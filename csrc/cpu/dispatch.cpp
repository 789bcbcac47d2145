// Chooses the instruction set once, by what the machine has.
#include "attention.h"

#include <atomic>
#include <stdexcept>

namespace treegrpo::cpu {

#define TREEGRPO_DECLARE(name)               \
  namespace name {                           \
  void forward(const ForwardParams& params); \
  void backward(const BackwardParams& params); \
  }
TREEGRPO_DECLARE(portable)
#if defined(__x86_64__) || defined(__i386__)
TREEGRPO_DECLARE(avx2)
TREEGRPO_DECLARE(avx512)
#endif
#undef TREEGRPO_DECLARE

namespace {

struct Kernels {
  const char* name;
  bool (*usable)();
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
};

// best first
const Kernels kAll[] = {
#if defined(__x86_64__) || defined(__i386__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     },
     avx512::forward, avx512::backward},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::forward,
     avx2::backward},
#endif
    {"portable", [] { return true; }, portable::forward, portable::backward},
};

const Kernels* find(const std::string& name) {
  for (const Kernels& k : kAll)
    if ((name.empty() || name == k.name) && k.usable()) return &k;
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not on this machine");
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* k = chosen.load();
  if (!k) chosen.store(k = find(""));
  return *k;
}

}  // namespace

void forward(const ForwardParams& params) { kernels().forward(params); }
void backward(const BackwardParams& params) { kernels().backward(params); }
const char* isa() { return kernels().name; }
void set_isa(const std::string& name) { chosen.store(find(name)); }

}  // namespace treegrpo::cpu
