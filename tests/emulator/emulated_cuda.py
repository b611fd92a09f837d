"""The CUDA kernels on the CPU: build tests/emulator into a library and (as a pytest plugin) make it the native backend.

    PYTHONPATH=tests/emulator python -m pytest -p emulated_cuda ...      runs tests on it
    python tests/emulator/emulated_cuda.py                               builds it and prints its path

The environment variables LTK_EMULATED_DEVICE and LTK_EMULATED_ORDER choose the chip and the threads' order; with
LTK_EMULATED_FUSED set, products and sums are fused where a GPU's compiler would.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (*sorted(ROOT.glob("csrc/*/cuda*.c*")), ROOT / "tests/emulator/emulator.cpp")
SCHEMAS = sorted(ROOT.glob("csrc/*/schema.h"))
# the compiler cannot see that what is read was filled in under the same condition
FLAGS = "-std=c++20 -O2 -fPIC -Wall -Werror -Wno-unknown-pragmas -Wno-maybe-uninitialized -DLTK_EMULATED".split()
CPUINFO = Path("/proc/cpuinfo")
#: Products are fused with what is added to them, as nvcc does it (LTK_EMULATED_FUSED; where the processor can).
FUSED = ["-mfma", "-ffp-contract=fast"]


def build() -> Path:
    """The library, built again only when its sources or torch changed."""
    files = sorted(path for folder in ("csrc", "tests/emulator") for path in (ROOT / folder).rglob("*.[ch]*"))
    fused = "LTK_EMULATED_FUSED" in os.environ and CPUINFO.exists() and " fma " in CPUINFO.read_text()
    flags, name = [*FLAGS, *(FUSED if fused else ())], "fused" if fused else "emulated"
    key = hashlib.sha256(" ".join([torch.__version__, *flags]).encode())
    for path in (*files, *SOURCES):
        key.update(path.read_bytes())
    folder = ROOT / "build/emulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}_{key.hexdigest()[:16]}.so"
    with FileLock(folder / "lock"):
        if library.exists():
            return library
        for old in folder.glob(f"{name}_*"):
            old.unlink()
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/emulator'}", *(f"-isystem{i}" for i in include_paths())]
        compiler = os.environ.get("CXX", "g++")

        def compile_one(source: Path) -> str:
            output = str(folder / f"{source.parent.name}_{source.name}_{name}.o")
            subprocess.run([compiler, *flags, *includes, "-x", "c++", "-c", str(source), "-o", output], check=True)
            return output

        schemas = folder / "schemas.cpp"
        schemas.write_text("".join(f'#include "{path}"\n' for path in SCHEMAS))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, (*SOURCES, schemas)))
        paths = [f"-L{path}" for path in library_paths()]
        command = [compiler, "-shared", *objects, *paths, "-lc10", "-ltorch", "-ltorch_cpu", "-o", f"{library}.new"]
        subprocess.run(command, check=True)
        Path(f"{library}.new").rename(library)
    return library


def install() -> None:
    """Make the emulated kernels the native backend of this process."""
    torch.ops.load_library(str(build()))
    from lt_kernels.ops import _backend
    from lt_kernels.ops._registry import flatten
    from lt_kernels.ops.expert_divergence import native as divergence
    from lt_kernels.ops.expert_fusion import native as fusion
    from lt_kernels.ops.margin_cross_entropy import native
    from lt_kernels.ops.partitioned_logsumexp import native as partitioned

    namespace = torch.ops.lt_kernels_emulated

    def forward(a, with_prediction, with_grad, *, out=None):
        *rows, grad = namespace.margin_cross_entropy_fwd(*flatten(a), with_prediction, with_grad, out)
        return (*rows, out if with_grad and out is not None else grad)

    def backward(grad_loss, grad_lse, rest, a, needs, *, out=None):
        grads = namespace.margin_cross_entropy_bwd(grad_loss, grad_lse, rest, *flatten(a), needs, out)
        return [out, *grads[1:]] if needs[0] and out is not None else grads

    native.forward, native.backward = forward, backward
    native.scale_gradient_ = namespace.scale_gradient_
    _backend._plain_function = lambda op: None  # plain calls would go to the CPU's kernels
    fusion.forward = lambda a, k, with_log_probs: namespace.expert_fusion(*a, k, with_log_probs)
    divergence.forward = lambda logits, class_scale, kind: namespace.expert_divergence_fwd(
        logits, class_scale, kind == "pairwise"
    )
    divergence.backward = lambda grad, saved, logits, class_scale, kind, detach: namespace.expert_divergence_bwd(
        grad, saved, logits, class_scale, kind == "pairwise", detach
    )
    partitioned.forward = lambda block, with_slopes: namespace.partitioned_logsumexp_fwd(*block, with_slopes)
    partitioned.backward = lambda block, terms, needs, out: namespace.partitioned_logsumexp_bwd(
        *block, terms, needs, out
    )


if __name__ == "__main__":
    print(build())
else:
    install()
