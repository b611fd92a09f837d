#include "cuda_kernels.h"

namespace ltk::cuda {
const Kernels<float> kernels_bfloat16 = Launches<BFloat16>::table;
}  // namespace ltk::cuda
