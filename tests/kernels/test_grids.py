"""Every launch fits the grid of a GPU, whatever the number of classes: launchers run with kernels that only note it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="the launchers are those of the Triton backend")

import torch

from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.expert_divergence import triton as divergence_backend
from lt_kernels.ops.expert_fusion import triton as fusion_backend
from lt_kernels.ops.expert_fusion.arguments import Arguments as FusionArguments
from lt_kernels.ops.margin_cross_entropy import triton as margin_backend
from lt_kernels.ops.margin_cross_entropy.arguments import DIFFERENTIABLE
from lt_kernels.ops.margin_cross_entropy.arguments import Arguments as RowArguments


class Stub:
    """Stand in for a kernel: keep the grids that it is launched on."""

    def __init__(self, kernel: object, grids: list[tuple[int, ...]]) -> None:
        self.arg_names, self.grids = kernel.arg_names, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *args, **named: None


@pytest.fixture
def grids(monkeypatch):
    """The grids of every launch; no kernel runs."""
    found: list[tuple[int, ...]] = []
    for name, module in list(sys.modules.items()):
        if re.match(r"lt_kernels\.ops\.\w+\.triton\.", name):
            for each, kernel in list(vars(module).items()):
                if each.endswith("_kernel"):
                    monkeypatch.setattr(module, each, Stub(kernel, found))
    return found


def fits_a_device(grid: tuple[int, ...]) -> bool:
    return grid[0] < 2**31 and all(0 < size <= 65535 for size in grid[1:])


@pytest.mark.parametrize("classes", [1_048_560, 1_048_561, 2_097_153, 2**27])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("needs", [("input",), ("input", "class_bias"), ("input", "target")])
def test_rows_of_very_many_classes_fit_a_grid(classes, transposed, needs, grids):
    """A grid of a GPU has at most 65,535 programs along its second dimension."""
    n = 256
    x = torch.empty(classes, n, device="meta").T if transposed else torch.empty(n, classes, device="meta")
    target = torch.empty(n, 1, dtype=torch.int64, device="meta")
    if "target" in needs:
        target = torch.empty_like(x).unsqueeze(2)
    options = RowOptions(target)._replace(class_bias=torch.empty(classes, device="meta"))
    a = RowArguments(x.unsqueeze(2), options)
    margin_backend.forward(a, False, True)
    rest = torch.empty(2, n, 1, device="meta")
    margin_backend.backward(torch.empty((), device="meta"), None, rest, a, [name in needs for name in DIFFERENTIABLE])
    assert len(grids) >= 2
    assert all(fits_a_device(grid) for grid in grids), grids


@pytest.mark.parametrize("experts", [1, 3, 9, 65])
@pytest.mark.parametrize("classes", [8_388_609, 2**26])
def test_experts_of_very_many_classes_fit_a_grid(classes, experts, grids):
    logits = [torch.empty(experts, 2, classes, dtype=torch.bfloat16, device="meta")]
    saved, grad = torch.empty(3 * experts + 2, 2, device="meta"), torch.empty(experts, 2, device="meta")
    divergence_backend.forward(logits, None, "to_mean")
    divergence_backend.backward(grad, saved, logits, None, "to_mean", False)
    fusion_backend.forward(FusionArguments(logits, None, None, None, [1.0] * experts, 1.0), 1, False)
    assert len(grids) >= 3
    assert all(fits_a_device(grid) for grid in grids), grids
