#define LTK_KERNELS "../../partitioned_logsumexp/cpu_kernels.h"
#include "../common/cpu/default.h"
