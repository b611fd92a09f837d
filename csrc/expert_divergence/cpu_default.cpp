#define LTK_KERNELS "../../expert_divergence/cpu_kernels.h"
#include "../common/cpu/default.h"
