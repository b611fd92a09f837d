#include "cuda_kernels.h"

namespace ltk::cuda {
const Kernels<float> kernels_float = Launches<Float>::table;
}  // namespace ltk::cuda
