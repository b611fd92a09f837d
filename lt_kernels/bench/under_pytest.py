"""The files under benchmarks/, one per op: its cases, providers and agreement checks under pytest-benchmark.

They are for comparing two revisions with pytest-benchmark's own tools (``--benchmark-autosave``,
``--benchmark-compare``); ``lt-kernels bench`` writes the committed records.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from .runner import inference_parts, training_parts, unavailable_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK_DTYPES = ("float32", "bfloat16")


def parameters(op: ModuleType) -> list[Any]:
    """Cases of this device and dtypes; all but those of ``lt-kernels bench compare`` are marked slow."""
    found = []
    for case in op.CASES.values():
        for dtype in op.DTYPES[DEVICE] if DEVICE in case.devices else ():
            slow = case.name not in op.COMPARE_CASES or dtype not in QUICK_DTYPES
            marks = [pytest.mark.slow] if slow else []
            found.append(pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=marks))
    return found


def step(benchmark: Any, op: ModuleType, case: Any, dtype: str, name: str) -> None:
    """Check a provider, then time it: forward and backward, or forward if that is all that the op has."""
    provider = op.PROVIDERS[name]
    reason = unavailable_reason(op.OP, name, DEVICE) or provider.unasked(DEVICE)
    reason = reason or provider.left_out(case, dtype, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    inputs = op.make_inputs(case, getattr(torch, dtype), DEVICE)
    if provider.is_loss:
        op.check_agreement(name, inputs)
    direction = op.DIRECTIONS[-1]
    parts = (inference_parts if direction == "fwd" else training_parts)(op.make_step(name, inputs))

    def run() -> None:
        for part in parts:
            part()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    cost = op.cost(case, getattr(torch, dtype), direction)
    benchmark.group = f"{op.OP} {case.name} {dtype} {DEVICE}"
    benchmark.extra_info["bytes_moved"] = cost.bytes_moved
    quick = cost.flops < 1e10 and case.logits < 2**25
    benchmark.pedantic(run, setup=inputs.drop_gradients, rounds=20 if quick else 3, warmup_rounds=2 if quick else 1)
