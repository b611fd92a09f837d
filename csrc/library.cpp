// The Python module lt_kernels._C. Every operator registers itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "common/cpu/host.h"
#include "common/plain_functions.h"

#define LTK_PLAIN(name)                                                                              \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&ltk::plain_##name)), METH_FASTCALL, \
   "Return the loss of a plain call, or None; see csrc/common/plain.h."}
static PyMethodDef plain_functions[] = {
    LTK_PLAIN(margin_cross_entropy), LTK_PLAIN(expert_cross_entropy), LTK_PLAIN(supervised_contrastive), {}};

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lt_kernels.";
  if (PyModule_AddFunctions(m.ptr(), plain_functions) != 0) throw pybind11::error_already_set();
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
