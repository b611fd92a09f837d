// The CPU kernels' vector code for the baseline instruction set.
#include <cmath>
#include <cstdint>
#include <type_traits>

#define LTK_ISA isa_default
#define LTK_BYTES 16
#define LTK_LEVEL 0
#include "expert_divergence/cpu_kernels.h"
#include "expert_fusion/cpu_kernels.h"
#include "margin_cross_entropy/cpu_kernels.h"
#include "partitioned_logsumexp/cpu_kernels.h"
