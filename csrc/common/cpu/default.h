// Compiles LTK_KERNELS, an operator's CPU kernels, for the baseline instruction set.
#include <cmath>
#include <cstdint>
#include <type_traits>

#define LTK_ISA isa_default
#define LTK_BYTES 16
#define LTK_LEVEL 0
#include LTK_KERNELS
