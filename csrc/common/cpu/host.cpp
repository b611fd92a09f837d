#include "host.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace ltk {
namespace {

Capability detect() {
  Capability best = Capability::kDefault;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) best = Capability::kAvx2;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Capability::kAvx512;
#endif
  const char* asked = std::getenv("LT_KERNELS_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') return best;
  Capability wanted = Capability::kDefault;
  if (std::strcmp(asked, "avx512") == 0) {
    wanted = Capability::kAvx512;
  } else if (std::strcmp(asked, "avx2") == 0) {
    wanted = Capability::kAvx2;
  } else {
    TORCH_CHECK_VALUE(std::strcmp(asked, "default") == 0, "LT_KERNELS_CPU_CAPABILITY: got '", asked,
                      "', expected 'default', 'avx2' or 'avx512'");
  }
  TORCH_CHECK(wanted <= best, "LT_KERNELS_CPU_CAPABILITY: this processor does not run '", asked, "'");
  return wanted;
}

}  // namespace

Capability capability() {
  static const Capability found = detect();
  return found;
}

const char* cpu_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace ltk
