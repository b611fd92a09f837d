#include "cuda_kernels.h"

namespace ltk::cuda {
const Kernels<double> kernels_double = Launches<Double>::table;
}  // namespace ltk::cuda
