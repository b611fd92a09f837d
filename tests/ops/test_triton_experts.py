"""expert_fusion and expert_divergence in Triton without a GPU: kernels in the interpreter, and the launch tables."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton")

from test_triton import run_in_the_interpreter

from lt_kernels.ops.expert_divergence import triton as divergence
from lt_kernels.ops.expert_fusion import triton as fusion


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    report = run_in_the_interpreter("triton_experts_interpreted.py")
    assert int(re.search(r"(\d+) passed", report)[1]) > 95, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.slow
def test_autograd_over_the_kernels_in_the_interpreter():
    """The public function; the other generic cases are run for the other backends, and take long here."""
    cases = "no_rows or one_expert or only_some or masked_in_one or double"
    report = run_in_the_interpreter("test_expert_divergence.py", "-k", f"({cases}) and not (fp64 or bf16)")
    assert int(re.search(r"(\d+) passed", report)[1]) >= 7, report[-1000:]


def power_of_two(*sizes: int) -> bool:
    return all(size >= 1 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("k", [0, 1, 8])
@pytest.mark.parametrize("classes", [1, 33, 129, 8142, 8192, 8193, 16384, 16391, 100_000, 10**6, 2**27])
def test_parts_of_the_fusion_cover_the_row(classes, k):
    for column_bytes in (2, 6, 12, 36):
        for group in (1, 2, 4, 8):
            launch = fusion._launch(classes, column_bytes, group, k)
            assert power_of_two(launch.group, launch.repeat, launch.tiles, launch.num_warps)
            assert launch.num_warps <= 16
            assert launch.group * launch.repeat * launch.tiles <= (32 if column_bytes <= 8 else 16)
            assert launch.parts * launch.part_groups >= classes // group
            assert launch.parts == 1 or (launch.parts - 1) * launch.part_groups < classes // group
            assert launch.parts * max(k, 1) <= fusion._CANDIDATES or classes > 10**6
            assert launch.parts == 1 or classes > 8192
            assert launch.parts < 65536


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 6, 8, 9, 17, 65])
def test_launches_of_the_divergence(experts):
    for classes in (1, 33, 1000, 8142, 8192, 100_000, 10**6):
        for group in (1, 2, 4, 8):
            for rows in (1, 256, 4096):
                forward = divergence._forward_launch(experts, rows, classes, group)
                backward = divergence._backward_launch(experts, classes, group)
                for launch in (forward, backward):
                    assert power_of_two(launch.group, launch.repeat, launch.num_warps)
                    assert launch.num_warps <= 8
                    assert launch.group <= group
                    assert launch.group * launch.repeat <= 16
                    assert launch.group * launch.repeat * experts <= max(divergence._PER_THREAD, experts)
                assert forward.group == backward.group
    assert divergence._forward_launch(3, 1024, 8142, 8).group == 8


def test_few_rows_get_more_warps():
    warps = [divergence._forward_launch(3, rows, 8142, 8).num_warps for rows in (64, 256, 1024, 8192)]
    assert warps == [8, 8, 2, 1]
