"""pytest-benchmark entry points: ``pytest benchmarks``, or ``-m "not slow"`` for the few cases of ``make bench``."""

from __future__ import annotations

import pytest

from lt_kernels.bench import contrastive as op
from lt_kernels.bench.under_pytest import parameters, step


@pytest.mark.parametrize("provider", op.PROVIDERS)
@pytest.mark.parametrize(("case", "dtype"), parameters(op))
def bench_forward_backward(benchmark, case, dtype, provider):
    step(benchmark, op, case, dtype, provider)
