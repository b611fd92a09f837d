"""Every op under pytest-benchmark: ``pytest benchmarks``; ``-k expert_fusion`` or ``-m "not slow"`` for fewer cases.

pytest-benchmark's own tools (``--benchmark-autosave``, ``--benchmark-compare``) compare two revisions.
``lt-kernels bench`` writes the committed records.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lt_kernels.bench.cases import Case
from lt_kernels.bench.op import Op
from lt_kernels.bench.ops import OPS
from lt_kernels.bench.runner import unavailable_reason
from lt_kernels.bench.timing import inference_parts, training_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK_DTYPES = ("float32", "bfloat16")


def parameters() -> list[Any]:
    """Every case, dtype and provider of this device; only the quick ones of `benchmarks/compare.py` are not slow."""
    found = []
    for op in OPS.values():
        for case in op.cases.values():
            for dtype in op.dtypes[DEVICE] if DEVICE in case.devices else ():
                quick = case.name in op.compare_cases and dtype in QUICK_DTYPES
                marks = [] if quick else [pytest.mark.slow]
                for provider in op.providers:
                    name = f"{op.name}-{case.name}-{dtype}-{provider}"
                    found.append(pytest.param(op, case, dtype, provider, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("op", "case", "dtype", "provider"), parameters())
def bench_op(benchmark: Any, op: Op, case: Case, dtype: str, provider: str) -> None:
    """Check a provider, then time it: forward and backward, or forward if the op has nothing else."""
    known = op.providers[provider]
    reason = unavailable_reason(op.name, provider, DEVICE) or known.unasked(DEVICE)
    reason = reason or known.left_out(case, dtype, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    inputs = case.inputs(getattr(torch, dtype), DEVICE)
    if known.is_loss:
        op.check_agreement(provider, inputs)
    direction = op.directions[-1]
    parts = (inference_parts if direction == "fwd" else training_parts)(op.make_step(provider, inputs))

    def run() -> None:
        for part in parts:
            part()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    cost = op.cost(case, getattr(torch, dtype), direction)
    benchmark.group = f"{op.name} {case.name} {dtype} {DEVICE}"
    benchmark.extra_info["bytes_moved"] = cost.bytes_moved
    quick = cost.flops < 1e10 and case.logits < 2**25
    benchmark.pedantic(run, setup=inputs.drop_gradients, rounds=20 if quick else 3, warmup_rounds=2 if quick else 1)
