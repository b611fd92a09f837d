"""Process-wide settings: the backend override, runtime checks, and the gradient policy.

They are plain module globals so that ``torch.compile`` guards on them and recompiles when one changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("reference", "native", "triton")
GRADIENT_POLICIES = ("auto", "one_pass", "recompute")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


backend: str = _choice("LT_KERNELS_BACKEND", os.environ.get("LT_KERNELS_BACKEND", "auto"), ("auto", *BACKENDS))
checks: bool = os.environ.get("LT_KERNELS_CHECK", "0") not in ("", "0")
gradient_policy: str = _choice(
    "LT_KERNELS_GRADIENT_POLICY", os.environ.get("LT_KERNELS_GRADIENT_POLICY", "auto"), GRADIENT_POLICIES
)


def checked_budget(value: object, name: str = "memory_budget") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int, in bytes")
    if not 1 <= value < 2**63:
        raise ValueError(f"{name}: got {value}, expected at least 1 byte and fewer than 2^63")
    return value


def _budget_from_environment() -> int:
    given = os.environ.get("LT_KERNELS_MEMORY_BUDGET", str(2 * 2**30))
    if not given.strip().isdecimal():
        raise ValueError(f"LT_KERNELS_MEMORY_BUDGET: got {given!r}, expected a number of bytes")
    return checked_budget(int(given), "LT_KERNELS_MEMORY_BUDGET")


memory_budget: int = _budget_from_environment()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the enclosed calls on one backend.

    Args:
        name: ``"reference"``, ``"native"`` or ``"triton"``: that backend runs or raises, with the reason why it cannot.
            ``"auto"`` restores the default choice by device.

    The setting is process-wide (not per thread). A backward pass uses the backend its forward pass ran on, wherever it
    is called. The environment variable ``LT_KERNELS_BACKEND`` sets the initial value.

    Raises:
        ValueError: if ``name`` is not a backend.
    """
    global backend
    previous = backend
    backend = _choice("use_backend(name)", name, ("auto", *BACKENDS))
    try:
        yield
    finally:
        backend = previous


def set_checks(enabled: bool) -> None:
    """Turn exact error reports for bad values in tensors on or off (default off, or ``LT_KERNELS_CHECK=1``).

    On the CPU an out-of-range target always raises ``IndexError``. On a GPU that needs a host synchronisation, so by
    default the row's loss and gradient become NaN; with checks on the same ``IndexError`` is raised there too.

    Raises:
        TypeError: if ``enabled`` is no bool.
    """
    global checks
    if not isinstance(enabled, bool):
        raise TypeError(f"set_checks(enabled): got {type(enabled).__name__}, expected a bool")
    checks = enabled


def set_gradient_policy(policy: str) -> None:
    """Choose when the gradient of a reduced loss is computed (``LT_KERNELS_GRADIENT_POLICY`` sets the initial value).

    Args:
        policy: ``"one_pass"`` computes the gradient of ``"mean"`` and ``"sum"`` losses together with the loss, so that
            logits are read once and the gradient is written once. ``"recompute"`` reads the logits again in backward.
            ``"auto"`` (default) is ``"one_pass"`` except for float16 logits, whose unscaled gradients would underflow
            before a gradient scaler could help. Both are right for every upstream gradient. Losses with
            ``reduction="none"``, ``return_lse=True``, learnable class vectors or probability targets that require
            gradients, and anything under ``torch.compile``, always recompute.

    Raises:
        ValueError: if ``policy`` is none of these.
    """
    global gradient_policy
    gradient_policy = _choice("set_gradient_policy(policy)", policy, GRADIENT_POLICIES)


def set_memory_budget(bytes: int) -> None:
    """Bound the buffer that linear heads compute logits in (``LT_KERNELS_MEMORY_BUDGET``; default 2 GiB).

    Args:
        bytes: bound of the logits' buffer of ``linear_margin_cross_entropy`` and ``linear_topk`` (at least one row
            is held). Logits that fit are kept from forward to backward; others are computed in chunks.

    Raises:
        TypeError, ValueError: if ``bytes`` is not a positive int.
    """
    global memory_budget
    memory_budget = checked_budget(bytes, "set_memory_budget(bytes)")
