// Which instruction set runs: the best one that the processor has, unless the environment says otherwise.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa/decide.h"

namespace dimap::cpu {
namespace {

const Kernels& choose() {
  const Kernels* available[3];
  const int n = available_kernels(available);
  const char* forced = std::getenv("DIMAP_ISA");
  if (forced == nullptr || *forced == 0) return *available[n - 1];
  std::string names;
  for (int i = 0; i < n; ++i) {
    if (std::strcmp(available[i]->name, forced) == 0) return *available[i];
    names += (i ? ", " : "") + std::string(available[i]->name);
  }
  throw std::runtime_error("DIMAP_ISA must be one of " + names + " on this processor, got '" + forced + "'");
}

}  // namespace

int available_kernels(const Kernels* out[3]) {
  int n = 0;
  out[n++] = &kPortable;
#if defined(DIMAP_X86)
  __builtin_cpu_init();
  // All that cmake/DimapKernels.cmake compiles them for: virtual machines may hide some of it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt"))
    out[n++] = &kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && n == 2)
    out[n++] = &kAvx512;
#endif
  return n;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dimap::cpu
