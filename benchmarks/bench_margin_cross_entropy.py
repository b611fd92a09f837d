"""pytest-benchmark entry points: ``pytest benchmarks --benchmark-only``.

The same cases, providers and agreement checks as ``lt-kernels bench``, which writes the committed records; this is for
comparing two revisions with pytest-benchmark's own tools (``--benchmark-autosave``, ``--benchmark-compare``).
"""

from __future__ import annotations

import pytest
import torch

from lt_kernels.bench import margin_cross_entropy as op
from lt_kernels.bench.runner import unavailable_reason

CASES = [case for case in op.CASES.values() if "cpu" in case.devices]


@pytest.mark.parametrize("provider", op.PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_forward_backward(benchmark, case, dtype, provider):
    reason = unavailable_reason(op.OP, provider, "cpu")
    if reason is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    inputs = op.make_inputs(case, dtype, "cpu")
    op.check_agreement(provider, inputs)
    loss = op.make_step(provider, inputs)

    def drop_gradient() -> None:
        inputs.logits.grad = None

    benchmark.group = f"{case.name} {dtype}"
    benchmark.extra_info["bytes_moved"], _ = op.cost(case, dtype, "fwd_bwd")
    benchmark.pedantic(lambda: loss().backward(), setup=drop_gradient, rounds=20, warmup_rounds=3)
