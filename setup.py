"""Decides what to build: no extension, or the C++ kernels for the CPU. Everything else is in pyproject.toml.

LT_KERNELS_BUILD = auto (default) | none | cpu | cuda. An explicit request that fails is an error; auto builds what it
can and otherwise installs the package without an extension (its reference and Triton backends), with one clear line.
"""

import os
import shutil
import sys

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = [
    "csrc/library.cpp",
    *(f"csrc/margin_cross_entropy/{name}.cpp" for name in ("cpu", "cpu_default", "cpu_avx2", "cpu_avx512")),
]
# GCC warns about vector arguments of functions that are inlined anyway, and about its own AVX-512 headers.
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def reason_against(mode: str) -> str | None:
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
    if mode == "cuda":
        return "this version has no CUDA C++ kernels; on a GPU use the Triton backend (pip install triton)"
    return None


def extension_arguments() -> dict:
    mode = os.environ.get("LT_KERNELS_BUILD", "auto")
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"LT_KERNELS_BUILD: got {mode!r}, expected 'auto', 'none', 'cpu' or 'cuda'")
    if mode == "none":
        return {}
    reason = reason_against(mode)
    if reason is not None:
        if mode != "auto":
            raise SystemExit(f"LT_KERNELS_BUILD={mode}: {reason}")
        print(f"lt_kernels: installing without the C++ extension: {reason}", file=sys.stderr)
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildNative(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if mode != "auto":
                    raise
                print(f"lt_kernels: installing without the C++ extension: it failed to build: {error}", file=sys.stderr)
                self.extensions = []

    # at::parallel_for is compiled into the caller: it needs the flag of the thread pool that torch was built with.
    openmp = ["-fopenmp"] if torch.backends.openmp.is_available() and sys.platform == "linux" else []
    flags = [*FLAGS, *openmp]
    facts = {"LTK_COMPILER": os.path.basename(compiler() or ""), "LTK_FLAGS": " ".join(flags)}
    extension = CppExtension(
        "lt_kernels._C",
        SOURCES,
        include_dirs=[os.path.join(HERE, "csrc")],
        depends=[os.path.join(folder, name) for folder, _, names in os.walk("csrc") for name in names],
        extra_compile_args=[*flags, *(f'-D{name}="{value}"' for name, value in facts.items())],
        extra_link_args=openmp,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


setup(**extension_arguments())
