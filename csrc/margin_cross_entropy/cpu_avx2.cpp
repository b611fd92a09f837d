#define LTK_KERNELS "../../margin_cross_entropy/cpu_kernels.h"
#include "../common/cpu/avx2.h"
