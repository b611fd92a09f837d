"""Launches that a test chooses: every name of the launchers that tests replace is in this module."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from lt_kernels.ops._gemm import launch as gemm
from lt_kernels.ops._rows.triton_launch import RowsLaunch
from lt_kernels.ops.expert_fusion.triton import launch as fusion
from lt_kernels.ops.linear_margin_cross_entropy.triton import launch as linear_table
from lt_kernels.ops.linear_margin_cross_entropy.triton import tiles as linear
from lt_kernels.ops.margin_cross_entropy.triton import launch as rows
from lt_kernels.ops.margin_cross_entropy.triton import mean
from lt_kernels.ops.partitioned_logsumexp.triton import launch as partitioned

expert_rows = importlib.import_module("lt_kernels.ops.expert_cross_entropy.triton.forward")

MonkeyPatch = pytest.MonkeyPatch


def wide_rows(monkeypatch: MonkeyPatch, body: str) -> None:
    """Visit rows in tiles of 512 columns, in one program ("loop") or in several for 640 columns each ("parts")."""

    def launch(rows_: int, classes: int, itemsize: int, aligned: bool, *others: Any, **named: Any) -> Any:
        group = 16 // itemsize if aligned else 1
        return RowsLaunch(body, group, 16 // group, 1, part_groups=640 // group, parts=-(-classes // 640))

    monkeypatch.setattr(rows, "rows_launch", launch)


def class_tiles(monkeypatch: MonkeyPatch, most: int) -> None:
    """Allow at most so many programs along the classes, as a grid allows 65,535."""
    monkeypatch.setattr(rows, "MOST_GRID_Y", most)
    monkeypatch.setattr(rows, "sums_launch", rows.sums_launch.__wrapped__)


def counted_rows(monkeypatch: MonkeyPatch, rows_of_a_program: int) -> None:
    """Let each program of the mean's coefficient count so many rows."""
    monkeypatch.setattr(mean, "_COUNTED", rows_of_a_program)


def linear_tiles(monkeypatch: MonkeyPatch, block_n: int, block_c: int, per_split: int | None = None) -> None:
    """Force the size of tiles, and how many a split has."""
    launch = gemm.Launch(block_n, block_c, 4, 2)
    monkeypatch.setattr(linear, "launches_of", lambda *sizes: linear_table.Launches(launch, launch, launch))
    if per_split is not None:
        monkeypatch.setattr(gemm, "tiles_per_split", lambda blocks, tiles, *others: min(tiles, per_split))


def contrastive_tiles(monkeypatch: MonkeyPatch, block_n: int, block_c: int, per_split: int | None = None) -> None:
    """Force the size of tiles, and how many a split has."""
    launch = gemm.Launch(block_n, block_c, 4, 2)
    monkeypatch.setattr(partitioned, "launches_of", lambda *sizes: partitioned.Launches(*[launch] * 5))
    if per_split is not None:
        contrastive_splits(monkeypatch, per_split)


def contrastive_splits(monkeypatch: MonkeyPatch, per_split: int | None) -> None:
    """Force how many tiles a split has; None: all of them."""
    monkeypatch.setattr(gemm, "tiles_per_split", lambda blocks, tiles, *others: min(tiles, per_split or tiles))


def fusion_parts(monkeypatch: MonkeyPatch) -> None:
    """Cut rows into parts of two tiles of 32 lanes."""

    def launch(classes: int, column_bytes: int, group: int, k: int) -> Any:
        repeat = max(8 // group, 1)
        return fusion.FusionLaunch(group, repeat, 2, 1, max(-(-(classes // group) // (64 * repeat)), 1))

    monkeypatch.setattr(fusion, "fusion_launch", launch)


def record_expert_launches(monkeypatch: MonkeyPatch) -> list[int]:
    """Return a list that receives the number of experts of every launch."""
    seen: list[int] = []
    kernel = expert_rows.expert_cross_entropy_forward_kernel

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            def launch(**arguments: Any) -> None:
                seen.append(arguments["EXPERTS"])
                kernel[grid](**arguments)

            return launch

    monkeypatch.setattr(expert_rows, "expert_cross_entropy_forward_kernel", Counting())
    return seen
