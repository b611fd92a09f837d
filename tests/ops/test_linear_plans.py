"""The plans of linear heads: what is kept, how it is cut, and that the plan is what runs."""

from __future__ import annotations

import pytest
import torch

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import linear_margin_cross_entropy
from lt_kernels.ops._gemm.layout import padded


def test_budget_decides_what_is_kept(monkeypatch):
    plans = {
        budget: lt_kernels.plan_linear(512, 64, 8142, device="cpu", memory_budget=budget)
        for budget in (2**31, 512 * 8144 * 4, 512 * 8144 * 4 - 1, 2**20, 1)
    }
    assert [p.strategy for p in plans.values()] == ["materialize", "materialize", "chunked", "chunked", "chunked"]
    for budget, p in plans.items():
        if p.by == "rows":
            assert p.chunk * 8144 * 4 <= max(budget, 8144 * 4)
            assert p.peak_memory >= p.chunk * 8142 * 4
    monkeypatch.setattr(_settings, "memory_budget", 2**20)
    assert lt_kernels.plan_linear(512, 64, 8142, device="cpu") == plans[2**20]


def test_few_rows_and_many_classes_are_cut_by_classes():
    p = lt_kernels.plan_linear(1024, 256, 4_000_000, torch.bfloat16, "cuda", strategy="chunked", memory_budget=2**28)
    assert p.by == "classes"
    assert 1024 * p.chunk * 2 <= 2**28
    assert p.flops == 8 * 1024 * 256 * 4_000_000
    p = lt_kernels.plan_linear(65_536, 2048, 100_000, torch.bfloat16, "cuda")
    assert (p.strategy, p.by) == ("chunked", "rows")
    assert p.chunk >= 4096
    assert p.chunk % 128 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plans_of_narrow_heads(dtype):
    narrow = lt_kernels.plan_linear(8192, 64, 100_000, dtype, "cuda")
    wide = lt_kernels.plan_linear(8192, 2048, 8142, dtype, "cuda")
    assert narrow.strategy == ("tiled" if dtype == torch.bfloat16 else "chunked")
    assert wide.strategy == "materialize"
    assert lt_kernels.plan_linear(8192, 64, 100_000, dtype, "cpu").strategy != "tiled"


def test_the_plan_is_what_runs(monkeypatch):
    """Chunks of the planned size, and no buffer beyond the budget."""
    seen = []
    monkeypatch.setattr(
        "lt_kernels.ops._gemm.products.buffer",
        lambda rows, columns, dtype, device: (
            seen.append((rows, columns)) or torch.empty(rows, padded(columns, dtype), dtype=dtype)[:, :columns]
        ),
    )
    x, w, y = torch.randn(300, 16, requires_grad=True), torch.randn(1000, 16), torch.randint(1000, (300,))
    for budget in (2**31, 2**19, 2**16):
        monkeypatch.setattr(_settings, "memory_budget", budget)
        seen.clear()
        linear_margin_cross_entropy(x, w, y).backward()
        p = lt_kernels.plan_linear(300, 16, 1000, device="cpu")
        rows, columns = (300, p.chunk) if p.by == "classes" else (p.chunk, 1000)
        assert seen[0] == (rows, columns)
        assert rows * columns * 4 <= budget


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4, 5), ValueError, "rows: got 0"),
        ((3, 4.0, 5), TypeError, "width: got float"),
        ((3, 4, True), TypeError, "classes: got bool"),
        ((3, 4, 5, torch.int64), TypeError, "dtype: got torch.int64"),
        ((3, 4, 5, torch.float32, "meta"), ValueError, "device: got 'meta'"),
    ],
    ids=lambda value: str(value),
)
def test_bad_sizes_of_a_plan(arguments, error, message):
    with pytest.raises(error, match=message):
        lt_kernels.plan_linear(*arguments)


@pytest.mark.parametrize("given", [0, -5, 1.5, True, "2G", 2**63], ids=str)
def test_bad_memory_budget(given):
    before = _settings.memory_budget
    with pytest.raises((TypeError, ValueError), match=r"set_memory_budget\(bytes\): got"):
        lt_kernels.set_memory_budget(given)
    assert _settings.memory_budget == before
