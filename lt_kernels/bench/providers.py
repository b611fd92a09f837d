"""What can be measured: our backends, plain PyTorch, other libraries. Each op makes its own list of these."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import info, use_backend
from .cases import Case

#: Returns a loss (0-dim), or work that has the form of one; of an op without a backward pass, the op's result.
Step = Callable[[], Any]


@dataclass(frozen=True)
class Provider:
    """A way to compute what the op computes.

    ``make`` turns inputs into a call without arguments. ``unavailable`` says for a device
    ("cpu" or "cuda") why the provider cannot run there, ``unasked`` why it is measured only when asked for, and
    ``left_out`` the same for one case and dtype on a device; None where that does not hold.
    """

    name: str
    make: Callable[[Any], Step]
    unavailable: Callable[[str], str | None] = lambda device: None
    unasked: Callable[[str], str | None] = lambda device: None
    left_out: Callable[[Case, str, str], str | None] = lambda case, dtype, device: None
    is_loss: bool = True  # False: work to compare times with, which agreement says nothing about
    compiler_seconds: float = 0.0  # about what its first calls take on a GPU, where that is what a budget is spent on

    @property
    def backend(self) -> str | None:
        """reference | native | triton where a provider of ours is one backend, else None."""
        return self.name[3:-1] if self.name.startswith("lt[") else None


def eager(name: str, loss: Callable[..., Any], arguments: Callable[[Any], tuple[Any, ...]]) -> Provider:
    """``loss`` of what ``arguments`` makes of the inputs."""

    def make(inputs: Any) -> Step:
        values = arguments(inputs)
        return lambda: loss(*values)

    return Provider(name, make)


def compiled(
    name: str,
    loss: Callable[..., Any],
    arguments: Callable[[Any], tuple[Any, ...]],
    mode: str | None = None,
    unasked: Callable[[str], str | None] = lambda device: None,
) -> Provider:
    """``torch.compile`` of ``loss`` with static shapes."""

    def make(inputs: Any) -> Step:
        function = torch.compile(loss, fullgraph=True, dynamic=False, mode=mode)
        values = arguments(inputs)
        return lambda: function(*values)

    return Provider(name, make, unasked=unasked, compiler_seconds=15.0 if mode is None else 40.0)


def ours(op: str, backend: str, loss: Callable[[Any], Any]) -> Provider:
    """``loss`` of the inputs on one backend."""

    def make(inputs: Any) -> Step:
        def step() -> Any:
            with use_backend(backend):
                return loss(inputs)

        return step

    def unasked(device: str) -> str | None:
        return "it defines the mathematics and is not meant to be fast" if backend == "reference" else None

    return Provider(f"lt[{backend}]", make, lambda device: backend_unavailable(op, backend, device), unasked)


def backend_unavailable(op: str, backend: str, device: str) -> str | None:
    reason: str | None = info()["backends"][op][device][backend]
    return reason


def kernels_unavailable(op: str, device: str) -> str | None:
    """Why the library would choose the reference, of which there is nothing to say; None where it has kernels."""
    backends = ("native", "triton") if device == "cuda" else ("native",)
    reasons = [backend_unavailable(op, backend, device) for backend in backends]
    return None if None in reasons else reasons[-1]


def peer(name: str, module: str, make: Callable[[Any, Any], Step]) -> Provider:
    """A library for GPUs, imported when first needed; ``make`` turns the module and inputs into a step."""

    def unavailable(device: str) -> str | None:
        if device != "cuda":
            return "its kernels need CUDA tensors"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except Exception as error:  # other people's packages fail to import in many ways
            return f"{module} cannot be imported: {first_line(error)}"
        return None

    return Provider(name, lambda inputs: make(importlib.import_module(module), inputs), unavailable)


def named(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
