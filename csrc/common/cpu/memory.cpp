#include "memory.h"

#include "../registration.h"

TORCH_LIBRARY_FRAGMENT(lt_kernels_native, m) { m.def("empty_pooled(int[] size, ScalarType dtype) -> Tensor"); }

// Without a tensor among its arguments, an operator has no device to be found by.
TORCH_LIBRARY_IMPL(lt_kernels_native, CompositeExplicitAutograd, m) { m.impl("empty_pooled", &ltk::MemoryPool::empty); }
