"""pytest-benchmark entry points: ``pytest benchmarks``, or ``-m "not slow"`` for the few cases of ``make bench``.

The same cases, providers and agreement checks as ``lt-kernels bench``, which writes the committed records; this is for
comparing two revisions with pytest-benchmark's own tools (``--benchmark-autosave``, ``--benchmark-compare``).
"""

from __future__ import annotations

import pytest
import torch

from lt_kernels.bench import margin_cross_entropy as op
from lt_kernels.bench.runner import DTYPES, unavailable_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK_DTYPES = ("float32", "bfloat16")


def parameters():
    for case in op.CASES.values():
        if DEVICE not in case.devices:
            continue
        for dtype in DTYPES:
            slow = case.name not in op.COMPARE_CASES or dtype not in QUICK_DTYPES
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=marks)


@pytest.mark.parametrize("provider", op.PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), parameters())
def bench_forward_backward(benchmark, case, dtype, provider):
    reason = unavailable_reason(op.OP, provider, DEVICE) or op.PROVIDERS[provider].unasked(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    inputs = op.make_inputs(case, getattr(torch, dtype), DEVICE)
    op.check_agreement(provider, inputs)
    loss = op.make_step(provider, inputs)

    def drop_gradient() -> None:
        inputs.logits.grad = None

    def step() -> None:
        loss().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} {dtype} {DEVICE}"
    benchmark.extra_info["bytes_moved"] = op.cost(case, getattr(torch, dtype), "fwd_bwd").bytes_moved
    benchmark.pedantic(step, setup=drop_gradient, rounds=20 if case.logits < 2**25 else 3, warmup_rounds=2)
