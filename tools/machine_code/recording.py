"""The kernel launches of a call, recorded instead of run, and what each compiles from."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITCallable, JITFunction, create_function_from_signature

import lt_kernels.ops

from .ledger import code_text, source_hash

#: What the arguments of every target are specialised by: pointers and integers that are multiples of 16 are marked.
_SPECIALIZER = make_backend(GPUTarget("cuda", 90, 32))


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]  # of the compiler: num_warps, num_stages, maxnreg

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def source(self) -> ASTSource:
        """Return what Triton's just-in-time compiler would build for these arguments, by its own rules."""
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, _SPECIALIZER)
        bound, specialization, _ = bind(**self.arguments)
        packed = self.kernel._pack_args(_SPECIALIZER, {}, bound, specialization, None)
        return ASTSource(self.kernel, *packed[1:])

    def options_for(self, gpu: GPUTarget) -> dict[str, int]:
        """Return the compiler's options; AMD's has no limit of registers."""
        return {key: value for key, value in self.options.items() if key != "maxnreg" or gpu.backend == "cuda"}

    def inputs(self, gpu: GPUTarget) -> str:
        """Return a description of everything that the machine code for a GPU depends on, but the compiler."""
        return f"{self._specialized} {sorted(self.options_for(gpu).items())} {gpu}"

    @functools.cached_property
    def _specialized(self) -> str:
        source = self.source()
        constants = sorted((path, _described(value)) for path, value in source.constants.items())
        attributes = sorted((path, value) for path, value in source.attrs.items() if value)
        return repr((code_hash(self.kernel), source.signature, constants, attributes))

    def pointer(self, name: str) -> int:
        """Return the number of a pointer among the parameters of the machine code."""
        signature = self.source().signature
        before = list(signature)[: list(signature).index(name)]
        return sum(_count_passed(signature[each]) for each in before)


def _count_passed(types: Any) -> int:
    return sum(map(_count_passed, types)) if isinstance(types, tuple) else types != "constexpr"


def _described(value: Any) -> str:
    return code_hash(value) if isinstance(value, JITCallable) else repr(value)


@functools.cache
def code_hash(function: JITCallable) -> str:
    """Return a hash of a kernel and everything it calls; comments, docstrings and line numbers do not count."""
    tree = function.parse()
    parts = [code_text(tree), str(getattr(function, "noinline", False))]
    for name, value in sorted(_globals(tree, function.fn.__globals__).items()):
        if isinstance(value, JITCallable):
            parts.append(f"{name}: {code_hash(value)}")
        elif inspect.isclass(value) and value.__module__.startswith("lt_kernels"):
            parts.append(f"{name}: {source_hash(textwrap.dedent(inspect.getsource(value)))}")
        elif isinstance(value, tl.constexpr) or not (callable(value) or isinstance(value, ModuleType)):
            parts.append(f"{name} = {value!r}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _globals(tree: ast.AST, namespace: dict[str, Any]) -> dict[str, Any]:
    """Return the globals that a function names, directly or as an attribute of a module of this package."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in namespace:
            found[node.id] = namespace[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = namespace.get(node.value.id)
            if isinstance(module, ModuleType) and module.__name__.startswith("lt_kernels"):
                found[f"{node.value.id}.{node.attr}"] = getattr(module, node.attr)
    return found


@functools.cache
def _modules() -> list[ModuleType]:
    """Return every module of the operators."""
    names = [each.name for each in pkgutil.walk_packages(lt_kernels.ops.__path__, "lt_kernels.ops.")]
    return [importlib.import_module(name) for name in names]


@contextmanager
def replaced(changes: Callable[[str, Any], Any]) -> Iterator[None]:
    """Replace what the operators' modules name: ``changes`` returns another value, or None to leave one."""
    originals = []
    try:
        for module in _modules():
            for name, value in list(vars(module).items()):
                other = changes(name, value)
                if other is not None:
                    originals.append((module, name, value))
                    setattr(module, name, other)
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


class _Recorder:
    """Stand in for a kernel: keep what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.arg_names, self.launches = kernel, kernel.arg_names, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            given = {**dict(zip(self.arg_names, args, strict=False)), **named}
            arguments = {name: value for name, value in given.items() if name in self.arg_names}
            options = {name: value for name, value in given.items() if name not in self.arg_names}
            self.launches.append(Launch(self.kernel, arguments, options))

        return launch


def record(call: Callable[[Any], None], config: Any, gpu: GPUTarget) -> list[Launch]:
    """Return the launches that a call makes on a GPU."""
    launches: list[Launch] = []
    architecture = 0 if gpu.backend == "hip" else gpu.arch
    pretended = {"architecture_of": lambda device: architecture}
    if hasattr(config, "precision"):
        pretended["product_precision"] = lambda dtype: config.precision

    def changes(name: str, value: Any) -> Any:
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            return _Recorder(value, launches)
        return pretended.get(name)

    with replaced(changes):
        call(config)
    return launches


def compile_launch(launch: Launch, gpu: GPUTarget) -> Any:
    """Compile a launch for a GPU."""
    return triton.compile(launch.source(), target=gpu, options=launch.options_for(gpu))
