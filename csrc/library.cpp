// The native operators' schemas and the Python module lt_kernels._C.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "margin_cross_entropy/arguments.h"

TORCH_LIBRARY(lt_kernels_native, m) {
  m.def("margin_cross_entropy_fwd(" LTK_MARGIN_CROSS_ENTROPY_SCHEMA
        ", bool with_prediction, bool with_grad) -> (Tensor loss, Tensor lse, Tensor prediction, Tensor rest, Tensor "
        "grad_input)");
  m.def("margin_cross_entropy_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor rest, " LTK_MARGIN_CROSS_ENTROPY_SCHEMA
        ", bool[] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) {
  m.impl("margin_cross_entropy_fwd", &ltk::margin_cross_entropy_fwd_cpu);
  m.impl("margin_cross_entropy_bwd", &ltk::margin_cross_entropy_bwd_cpu);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lt_kernels.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = LTK_COMPILER;
        info["flags"] = LTK_FLAGS;
        info["cuda_architectures"] = pybind11::list();
        info["devices"] = std::vector<std::string>{"cpu"};
        info["torch"] = TORCH_VERSION;
        info["cpu_capability"] = ltk::cpu_capability();
        return info;
      },
      "Compiler, flags, CUDA architectures and torch version of the build, and the instruction set that runs here.");
}
