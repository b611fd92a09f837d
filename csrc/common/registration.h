// The library that operators register with. A folder of csrc is an operator: schema.h defines it, cpu.cpp and
// cuda.cpp implement it. In the emulator's library the CUDA kernels implement it for CPU tensors.
#pragma once

#include <torch/library.h>

#if defined(LTK_EMULATED)
#define LTK_LIBRARY lt_kernels_emulated
#define LTK_CUDA CPU
#else
#define LTK_LIBRARY lt_kernels_native
#define LTK_CUDA CUDA
#endif

// Lists of an operator's arguments are written once, as LIST(X) = X(type, schema, name) ..., and used as
#define LTK_SCHEMA(type, schema, name) ", " schema " " #name    // "Tensor input" LIST(LTK_SCHEMA)
#define LTK_PARAMETER(type, schema, name) , type name           // (const Tensor& input LIST(LTK_PARAMETER))
#define LTK_FIELD(type, schema, name) std::decay_t<type> name;  // struct Options { LIST(LTK_FIELD) }
#define LTK_VALUE(type, schema, name) name,                     // Options{LIST(LTK_VALUE)}
