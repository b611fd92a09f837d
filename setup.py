"""Decides what to build: no extension, the C++ kernels for the CPU, or those and the CUDA ones. Everything else is in
pyproject.toml.

LT_KERNELS_BUILD = auto (default) | none | cpu | cuda. An explicit request that fails is an error; auto builds what it
can and otherwise installs the package without an extension (its reference and Triton backends), with one clear line.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))
FOUND = sorted(glob.glob("csrc/**/*.c*", recursive=True, root_dir=HERE))
CUDA_SOURCES = [path for path in FOUND if os.path.basename(path).startswith("cuda")]
SOURCES = [path for path in FOUND if path not in CUDA_SOURCES]
CUDA_FLAGS = ["-O3"]
#: Compute capabilities that are built for where neither TORCH_CUDA_ARCH_LIST nor a GPU says which.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_ARCHITECTURES_BEFORE_12_8 = "8.0;9.0+PTX"
# GCC warns about vector arguments of functions that are inlined anyway, and about its own AVX-512 headers.
# Python's own flags ask for debugging symbols, which would take a third of the time and most of the file.
FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def reason_against() -> str | None:
    """Why the extension cannot be built, or None."""
    if sys.platform == "win32":
        return "the C++ kernels are not built on Windows"
    if compiler() is None:
        return "no C++ compiler was found"
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken torch raises other things than ImportError
        return (
            f"torch is not importable while building ({error}; build isolation hides it): "
            "install torch first, then pip install --no-build-isolation ."
        )
    try:
        import ninja  # noqa: F401
    except ImportError:
        if shutil.which("ninja") is None:
            return "ninja was not found (pip install ninja)"
    return None


def nvcc_release(home: str) -> tuple[int, int] | None:
    nvcc = os.path.join(home, "bin", "nvcc")
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    return (int(found[1]), int(found[2])) if found else None


def reason_against_cuda() -> str | None:
    """Why the CUDA kernels cannot be built where the CPU ones can, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    too_old = re.findall(r"\b[1-7]\.\d", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if too_old:
        return f"TORCH_CUDA_ARCH_LIST names {too_old[0]}; the CUDA kernels need compute capability 8.0 or newer"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    needed = [os.path.join(CUDA_HOME or "", *path) for path in (("bin", "nvcc"), ("include", "cuda_runtime.h"))]
    missing = next((path for path in needed if not os.path.exists(path)), None)
    if missing is not None:
        return f"CUDA_HOME={CUDA_HOME} is no CUDA toolkit: {missing} is not there"
    release = nvcc_release(CUDA_HOME)
    if release is None or release[0] != int(torch.version.cuda.split(".")[0]):
        version = ".".join(map(str, release)) if release else "unknown"
        return f"nvcc is version {version}, but torch was built with CUDA {torch.version.cuda}"
    return None


def cuda_architectures() -> str:
    """Compute capabilities to build for, in the manner of TORCH_CUDA_ARCH_LIST, which this sets for torch's builder."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        default = (
            CUDA_ARCHITECTURES if (nvcc_release(CUDA_HOME) or (0, 0)) >= (12, 8) else CUDA_ARCHITECTURES_BEFORE_12_8
        )
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in sorted(here)) or default
    return os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")


def extension(cuda: bool):
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # at::parallel_for is compiled into the caller: it needs the flag of the thread pool that torch was built with.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform == "linux" else []
    flags = [*FLAGS, *openmp]
    facts = {"LTK_COMPILER": os.path.basename(compiler() or ""), "LTK_FLAGS": " ".join(flags)}
    if cuda:
        facts["LTK_CUDA_ARCHITECTURES"] = cuda_architectures()
    flags += [f'-D{name}="{value}"' for name, value in facts.items()]
    return (CUDAExtension if cuda else CppExtension)(
        "lt_kernels._C",
        [*SOURCES, *(CUDA_SOURCES if cuda else [])],
        include_dirs=[os.path.join(HERE, "csrc")],
        depends=[os.path.join(folder, name) for folder, _, names in os.walk("csrc") for name in names],
        extra_compile_args={"cxx": flags, "nvcc": CUDA_FLAGS},
        extra_link_args=openmp,
    )


def extension_arguments() -> dict:
    mode = os.environ.get("LT_KERNELS_BUILD", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"LT_KERNELS_BUILD: got {mode!r}, expected 'auto', 'none', 'cpu' or 'cuda'")
    if mode == "none":
        return {}
    reason = reason_against()
    if reason is not None:
        if mode != "auto":
            raise SystemExit(f"LT_KERNELS_BUILD={mode}: {reason}")
        print(f"lt_kernels: installing without the C++ extension: {reason}", file=sys.stderr)
        return {}
    reason = reason_against_cuda() if mode != "cpu" else "not asked for"
    if mode == "cuda" and reason is not None:
        raise SystemExit(f"LT_KERNELS_BUILD=cuda: {reason}")
    if mode == "auto" and reason is not None:
        print(f"lt_kernels: building without the CUDA C++ kernels: {reason}", file=sys.stderr)
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        def run(self) -> None:
            attempts = [self.extensions]
            if mode == "auto" and reason is None:
                attempts.append([extension(cuda=False)])
            for self.extensions in attempts:
                try:
                    return super().run()
                except Exception as error:
                    if mode != "auto":
                        raise
                    what = "CUDA C++ kernels" if self.extensions is not attempts[-1] else "C++ extension"
                    print(f"lt_kernels: installing without the {what}: build failed: {error}", file=sys.stderr)
            self.extensions = []

    return {"ext_modules": [extension(cuda=reason is None)], "cmdclass": {"build_ext": BuildNative}}


setup(**extension_arguments())
