"""The code that can be measured: our backends, plain PyTorch, other libraries. Each op lists its own providers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _settings, info, use_backend
from ..ops._backend import resolve
from .cases import Case, Inputs

#: Returns a loss (0-dim), or work that has the form of one; an op without a backward pass returns its result.
Step = Callable[[], Any]
#: Says for a device ("cpu" or "cuda") why something does not hold there; None where it holds.
Reason = Callable[[str], str | None]
#: The same for one case and dtype on a device.
CaseReason = Callable[[Case, str, str], str | None]


def _no_reason(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """A way to compute what the op computes; ``make`` turns inputs into a call without arguments."""

    name: str
    make: Callable[[Inputs], Step]
    unavailable: Reason = _no_reason  # why it cannot run on a device
    unasked: Reason = _no_reason  # why it is measured only when asked for
    left_out: CaseReason = _no_reason  # the same for one case and dtype
    is_loss: bool = True  # False: work to compare times with, which agreement says nothing about
    compiler_seconds: float = 0.0  # roughly the time of its first calls on a GPU, if that is worth budgeting

    @property
    def backend(self) -> str | None:
        """reference | native | triton if a provider of ours is one backend, else None."""
        return self.name[3:-1] if self.name.startswith("lt[") else None


Loss = Callable[..., Any]
Arguments = Callable[[Inputs], tuple[Any, ...]]


def whole(inputs: Inputs) -> tuple[Inputs]:
    """Return the arguments of a loss that takes the inputs as they are."""
    return (inputs,)


def eager(name: str, loss: Loss, arguments: Arguments = whole) -> Provider:
    """``loss`` of ``arguments`` of the inputs."""
    return Provider(name, lambda inputs: partial(loss, *arguments(inputs)))


def compiled(
    loss: Loss, arguments: Arguments = whole, name: str = "compile", mode: str | None = None, **reasons: Any
) -> Provider:
    """``torch.compile`` of ``loss`` with static shapes; ``reasons`` are fields of the provider."""

    def make(inputs: Inputs) -> Step:
        return partial(torch.compile(loss, fullgraph=True, dynamic=False, mode=mode), *arguments(inputs))

    return Provider(name, make, compiler_seconds=15.0 if mode is None else 40.0, **reasons)


def backends(op: str, make: Callable[[Inputs], Step]) -> tuple[Provider, ...]:
    """One call of ours, made by ``make``, on each backend."""
    return tuple(_backend(op, name, make) for name in ("reference", "native", "triton"))


def _backend(op: str, backend: str, make: Callable[[Inputs], Step]) -> Provider:
    def make_there(inputs: Inputs) -> Step:
        call = make(inputs)
        if _settings.backend == "auto" and resolve(op, inputs.in_memory) == backend:
            return call  # as users write it: asking for a backend by name takes time, too

        def step() -> Any:
            with use_backend(backend):
                return call()

        return step

    def unasked(device: str) -> str | None:
        return "it defines the mathematics and is not meant to be fast" if backend == "reference" else None

    return Provider(f"lt[{backend}]", make_there, lambda device: backend_unavailable(op, backend, device), unasked)


def strategies(
    op: str, loss: Callable[..., Tensor], left_out: Callable[[str, Case, str, str], str | None]
) -> tuple[Provider, ...]:
    """``loss`` of the inputs with each strategy by name, on the backend that the library chooses."""

    def one(name: str) -> Provider:
        def unavailable(device: str) -> str | None:
            if name != "tiled":
                return kernels_unavailable(op, device)
            return "it needs CUDA tensors" if device == "cpu" else backend_unavailable(op, "triton", device)

        def make(inputs: Inputs) -> Step:
            return partial(loss, inputs, strategy=name)

        return Provider(f"lt-{name}", make, unavailable, left_out=partial(left_out, name))

    return tuple(map(one, ("materialize", "chunked", "tiled")))


def backend_unavailable(op: str, backend: str, device: str) -> str | None:
    reason: str | None = info()["backends"][op][device][backend]
    return reason


def kernels_unavailable(op: str, device: str) -> str | None:
    """Say why the library would choose the reference on ``device``; None where the op has kernels."""
    names = ("native", "triton") if device == "cuda" else ("native",)
    reasons = [backend_unavailable(op, name, device) for name in names]
    return None if None in reasons else reasons[-1]


def peer(
    name: str, module: str, member: str, call: Callable[[Loss, Inputs], Step], needs: str = "", **options: Any
) -> Provider:
    """A loss of another library for GPUs, imported when first needed; ``call`` makes a step of it and the inputs.

    A class is made with ``options``, a function called with them. A loss that can write gradients over its logits does.
    ``needs`` is a parameter that older versions lack.
    """

    def imported() -> Any:
        return getattr(importlib.import_module(module), member)

    def make(inputs: Inputs) -> Step:
        loss, given = imported(), dict(options)
        if "inplace_backward" in inspect.signature(loss).parameters:
            given["inplace_backward"] = True
        ready: Loss = loss(**given) if isinstance(loss, type) else partial(loss, **given)
        return call(ready, inputs)

    def unavailable(device: str) -> str | None:
        reason = import_failure(module) if device == "cuda" else "its kernels need CUDA tensors"
        if reason is None and needs and needs not in inspect.signature(imported()).parameters:
            return f"the installed {member} takes no {needs}, so it cannot add the log prior"
        return reason

    return Provider(name, make, unavailable)


def import_failure(*modules: str) -> str | None:
    """Say why one of ``modules`` cannot be imported; None if all can."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except Exception as error:  # other people's packages fail to import in many ways
            return f"{name} cannot be imported: {first_line(error)}"
    return None


def headlines_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    """For ``Provider.left_out``: on a CPU the provider is too slow, or too slow to compile, for every case."""
    if device == "cpu" and device not in case.headline and not case.calls:
        return "on a CPU it is measured in headline cases and small calls only"
    return None


def module(make: Callable[[Inputs], Step]) -> Provider:
    """The module that users put in place of torch's, where the calls themselves are what takes time."""

    def left_out(case: Case, dtype: str, device: str) -> str | None:
        return None if case.calls else "its time differs from the function's in small calls only"

    return Provider("lt-module", make, left_out=left_out)


class Products:
    """The matrix products alone, in the form of a loss: X Y^T when called, both gradients' products in ``backward``.

    ``torch.mm`` writes into outputs that exist already. Only the first ``learning`` rows of ``y`` have a gradient.
    """

    def __init__(self, x: Tensor, y: Tensor, learning: int | None = None) -> None:
        self._x, self._y = x.detach(), y.detach()
        self.product = self._x.new_empty(len(x), len(y))
        self.of_x, self.of_y = torch.empty_like(self._x), torch.empty_like(self._y[:learning])

    def __call__(self) -> Products:
        torch.mm(self._x, self._y.T, out=self.product)
        return self

    def backward(self) -> None:
        torch.mm(self.product, self._y, out=self.of_x)
        if len(self.of_y) > 0:
            torch.mm(self.product[:, : len(self.of_y)].T, self._x, out=self.of_y)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
