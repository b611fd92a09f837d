// The native operators' schemas and the Python module lt_kernels._C.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu_host.h"
#include "cpu_memory.h"
#include "expert_cross_entropy/arguments.h"
#include "expert_divergence/arguments.h"
#include "expert_fusion/arguments.h"
#include "margin_cross_entropy/arguments.h"
#include "partitioned_logsumexp/arguments.h"

TORCH_LIBRARY(lt_kernels_native, m) {
  LTK_MARGIN_CROSS_ENTROPY_SCHEMAS(m);
  LTK_EXPERT_CROSS_ENTROPY_SCHEMAS(m);
  LTK_EXPERT_FUSION_SCHEMAS(m);
  LTK_EXPERT_DIVERGENCE_SCHEMAS(m);
  LTK_PARTITIONED_LOGSUMEXP_SCHEMAS(m);
  m.def("empty_pooled(int[] size, ScalarType dtype) -> Tensor");
}

// Without a tensor among its arguments, an operator has no device to be found by.
TORCH_LIBRARY_IMPL(lt_kernels_native, CompositeExplicitAutograd, m) { m.impl("empty_pooled", &ltk::empty_pooled); }

TORCH_LIBRARY_IMPL(lt_kernels_native, CPU, m) {
  m.impl("margin_cross_entropy_fwd", &ltk::margin_cross_entropy_fwd_cpu);
  m.impl("margin_cross_entropy_bwd", &ltk::margin_cross_entropy_bwd_cpu);
  m.impl("scale_gradient_", &ltk::scale_gradient_cpu);
  m.impl("expert_cross_entropy_fwd", &ltk::expert_cross_entropy_fwd_cpu);
  m.impl("expert_fusion", &ltk::expert_fusion_cpu);
  m.impl("expert_divergence_fwd", &ltk::expert_divergence_fwd_cpu);
  m.impl("expert_divergence_bwd", &ltk::expert_divergence_bwd_cpu);
  m.impl("partitioned_logsumexp_fwd", &ltk::partitioned_logsumexp_fwd_cpu);
  m.impl("partitioned_logsumexp_bwd", &ltk::partitioned_logsumexp_bwd_cpu);
}

#if defined(LTK_CUDA_ARCHITECTURES)
TORCH_LIBRARY_IMPL(lt_kernels_native, CUDA, m) {
  m.impl("margin_cross_entropy_fwd", &ltk::margin_cross_entropy_fwd_cuda);
  m.impl("margin_cross_entropy_bwd", &ltk::margin_cross_entropy_bwd_cuda);
  m.impl("scale_gradient_", &ltk::scale_gradient_cuda);
  m.impl("expert_fusion", &ltk::expert_fusion_cuda);
  m.impl("expert_divergence_fwd", &ltk::expert_divergence_fwd_cuda);
  m.impl("expert_divergence_bwd", &ltk::expert_divergence_bwd_cuda);
  m.impl("partitioned_logsumexp_fwd", &ltk::partitioned_logsumexp_fwd_cuda);
  m.impl("partitioned_logsumexp_bwd", &ltk::partitioned_logsumexp_bwd_cuda);
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lt_kernels.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = LTK_COMPILER;
        info["flags"] = LTK_FLAGS;
#if defined(LTK_CUDA_ARCHITECTURES)
        info["cuda_architectures"] = pybind11::str(LTK_CUDA_ARCHITECTURES).attr("split")();
        info["devices"] = std::vector<std::string>{"cpu", "cuda"};
#else
        info["cuda_architectures"] = pybind11::list();
        info["devices"] = std::vector<std::string>{"cpu"};
#endif
        info["torch"] = TORCH_VERSION;
        info["cpu_capability"] = ltk::cpu_capability();
        return info;
      },
      "Compiler, flags, CUDA architectures and torch version of the build, and the instruction set that runs here.");
}
