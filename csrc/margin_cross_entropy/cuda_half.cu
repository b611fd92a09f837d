#include "cuda_kernels.h"

namespace ltk::cuda {
const Kernels<float> kernels_half = Launches<Half>::table;
}  // namespace ltk::cuda
