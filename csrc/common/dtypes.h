// Dtypes of logits, as the kernels name them.
#pragma once

namespace ltk {

enum Dtype { kFloat, kBFloat16, kHalf, kDouble };

}  // namespace ltk
