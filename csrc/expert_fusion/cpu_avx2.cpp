#define LTK_KERNELS "../../expert_fusion/cpu_kernels.h"
#include "../common/cpu/avx2.h"
