"""Launches that a test chooses: every name of the launchers that tests replace is in this module."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from lt_kernels.ops._gemm.launch import Launch
from lt_kernels.ops._rows.triton_launch import RowsLaunch
from lt_kernels.ops.expert_fusion.triton.launch import FusionLaunch
from lt_kernels.ops.linear_margin_cross_entropy.triton.launch import Launches as LinearLaunches
from lt_kernels.ops.partitioned_logsumexp.triton.launch import Launches as ContrastiveLaunches

MonkeyPatch = pytest.MonkeyPatch


def replace(monkeypatch: MonkeyPatch, op: str, name: str, value: Any) -> None:
    """Replace a name in every module of an operator's Triton backend, and of what tiles share, that knows it."""
    packages = (f"lt_kernels.ops.{op}.triton", "lt_kernels.ops._gemm")
    importlib.import_module(packages[0])
    modules = [module for path, module in sys.modules.items() if path.startswith(packages)]
    known = [module for module in modules if hasattr(module, name)]
    assert known, f"{packages[0]} has no {name}"
    for module in known:
        monkeypatch.setattr(module, name, value)


def wide_rows(monkeypatch: MonkeyPatch, body: str) -> None:
    """Visit rows in tiles of 512 columns, in one program ("loop") or in several for 640 columns each ("parts")."""

    def launch(rows: int, classes: int, itemsize: int, aligned: bool, *others: Any, **named: Any) -> RowsLaunch:
        group = 16 // itemsize if aligned else 1
        return RowsLaunch(body, group, 16 // group, 1, part_groups=640 // group, parts=-(-classes // 640))

    replace(monkeypatch, "margin_cross_entropy", "rows_launch", launch)


def class_tiles(monkeypatch: MonkeyPatch, most: int) -> None:
    """Allow at most so many programs along the classes, as a grid allows 65,535."""
    replace(monkeypatch, "margin_cross_entropy", "MOST_GRID_Y", most)
    launch = importlib.import_module("lt_kernels.ops.margin_cross_entropy.triton.launch")
    monkeypatch.setattr(launch, "sums_launch", launch.sums_launch.__wrapped__)


def counted_rows(monkeypatch: MonkeyPatch, rows_of_a_program: int) -> None:
    """Let each program of the mean's coefficient count so many rows."""
    replace(monkeypatch, "margin_cross_entropy", "_COUNTED", rows_of_a_program)


def splits(monkeypatch: MonkeyPatch, op: str, per_split: int | None) -> None:
    """Force how many tiles a split has; None: all of them."""
    replace(monkeypatch, op, "tiles_per_split", lambda blocks, tiles, *others: min(tiles, per_split or tiles))


def linear_tiles(monkeypatch: MonkeyPatch, block_n: int, block_c: int, per_split: int | None = None) -> None:
    """Force the size of tiles, and how many a split has."""
    op, launch = "linear_margin_cross_entropy", Launch(block_n, block_c, 4, 2)
    replace(monkeypatch, op, "launches_of", lambda *sizes: LinearLaunches(*[launch] * len(LinearLaunches._fields)))
    if per_split is not None:
        splits(monkeypatch, op, per_split)


def contrastive_tiles(monkeypatch: MonkeyPatch, block_n: int, block_c: int, per_split: int | None = None) -> None:
    """Force the size of tiles, and how many a split has."""
    op, launch = "partitioned_logsumexp", Launch(block_n, block_c, 4, 2)
    launches = ContrastiveLaunches(*[launch] * len(ContrastiveLaunches._fields))
    replace(monkeypatch, op, "launches_of", lambda *sizes: launches)
    if per_split is not None:
        splits(monkeypatch, op, per_split)


def fusion_parts(monkeypatch: MonkeyPatch) -> None:
    """Cut rows into parts of two tiles of 32 lanes."""

    def launch(classes: int, column_bytes: int, group: int, k: int) -> FusionLaunch:
        repeat = max(8 // group, 1)
        return FusionLaunch(group, repeat, 2, 1, max(-(-(classes // group) // (64 * repeat)), 1))

    replace(monkeypatch, "expert_fusion", "fusion_launch", launch)


def record_expert_launches(monkeypatch: MonkeyPatch) -> list[int]:
    """Return a list that receives the number of experts of every launch."""
    seen: list[int] = []
    forward = importlib.import_module("lt_kernels.ops.expert_cross_entropy.triton.forward")
    kernel = forward.expert_cross_entropy_forward_kernel

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            def launch(**arguments: Any) -> None:
                seen.append(arguments["EXPERTS"])
                kernel[grid](**arguments)

            return launch

    monkeypatch.setattr(forward, "expert_cross_entropy_forward_kernel", Counting())
    return seen
