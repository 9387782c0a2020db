// Which kernels this machine runs.
#include <cstring>

#include "kernels.h"

namespace optlm {
namespace {

#if defined(OPTLM_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

const Kernels* select_kernels(const char* isa) {
  const bool automatic = std::strcmp(isa, "auto") == 0;
#if defined(OPTLM_X86)
  if ((automatic || std::strcmp(isa, "avx512") == 0) && has_avx512()) return &avx512_kernels();
  if ((automatic || std::strcmp(isa, "avx2") == 0) && has_avx2()) return &avx2_kernels();
#endif
  if (automatic || std::strcmp(isa, "reference") == 0) return &reference_kernels();
  return nullptr;
}

}  // namespace optlm
