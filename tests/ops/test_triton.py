"""The Triton backend without a GPU: kernels in the interpreter (a process of its own), and the launch table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton")

from lt_kernels.ops.margin_cross_entropy import triton as backend

HERE = Path(__file__).parent


def run_in_the_interpreter(file: str, *options: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LT_KERNELS_TEST_BACKENDS": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", *options]
    result = subprocess.run([*command, str(HERE / file)], env=environment, capture_output=True, text=True, timeout=1200)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-6000:]
    return report


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    report = run_in_the_interpreter("triton_interpreted.py")
    assert int(re.search(r"(\d+) passed", report)[1]) > 470, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.slow
def test_every_generic_case_in_the_interpreter():
    """The suite of all backends, but for what needs float64 or the other backends (and is run for them elsewhere)."""
    elsewhere = "fp64 or TestProperties or gradcheck or same_bits or opcheck or compile"
    report = run_in_the_interpreter("test_margin_cross_entropy.py", "-k", f"not ({elsewhere})")
    assert int(re.search(r"(\d+) passed", report)[1]) > 600, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [129, 1000, 8142, 8192, 8199, 21841, 32768, 32769, 65536, 1_000_000, 2**27])
@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_rows_launch_covers_the_row(rows, classes, itemsize):
    for aligned in (False, True):
        for hungry in range(4):
            launch = backend._rows_launch(rows, classes, itemsize, aligned, hungry)
            assert launch.group == (16 // itemsize if aligned else 1)
            for power_of_two in (launch.repeat, launch.num_warps):
                assert power_of_two & (power_of_two - 1) == 0
            assert 1 <= launch.num_warps <= 32
            assert launch.lanes == 32 * launch.num_warps
            assert launch.group * launch.repeat <= 64
            if launch.body == "tile":  # every whole group, wherever the row starts
                assert launch.block >= classes // launch.group * launch.group
                assert launch.block <= 32768
            else:
                assert launch.group * launch.repeat == 16
            if launch.body == "parts":
                assert launch.parts * launch.part_groups * launch.group >= classes
                assert (launch.parts - 1) * launch.part_groups * launch.group < classes
                assert launch.parts <= 1024
                assert launch.part_groups * launch.group % launch.block == 0
        backward = backend._rows_backward_launch(classes, itemsize, aligned)
        assert backward.block <= 4096
        assert backward.part_groups * backward.group == backward.block
        assert backward.parts * backward.block >= classes // backward.group * backward.group
        assert backward.parts <= 65535


def test_one_pass_at_the_sizes_that_matter():
    for rows in (1, 64, 8192):
        assert backend._rows_launch(rows, 8142, 2, True).body == "tile"
        assert backend._rows_launch(rows, 8142, 2, True).block == 8192
        assert backend._rows_launch(rows, 32768, 2, True).body == "tile"
        assert backend._rows_launch(rows, 32768 + 8, 2, True).body != "tile"


@pytest.mark.parametrize(
    ("rows", "classes", "itemsize", "body"),
    [
        (64, 1_000_000, 2, "parts"),  # 68 of 132 multiprocessors would be idle
        (64, 1_000_000, 4, "parts"),
        (64, 100_000, 2, "parts"),  # and all rows fit into L2
        (1, 32_776, 2, "loop"),  # too short a call for two more launches
        (132, 100_000, 2, "loop"),  # a full wave, and its rows fit into L2 nearly
        (4096, 65_536, 2, "loop"),
        (4096, 100_000, 2, "loop"),
        (8192, 1_000_000, 2, "loop"),  # neither fits: the fewer launches
        (140, 1_000_000, 2, "parts"),  # a second wave of 8 rows
    ],
)
def test_wide_rows_are_visited_whole_or_in_parts(rows, classes, itemsize, body):
    assert backend._rows_launch(rows, classes, itemsize, True).body == body


def test_programs_that_loop_leave_their_rows_in_the_cache():
    for classes in (32776, 65536, 94_000):
        launch = backend._rows_launch(4096, classes, 2, True)
        assert launch.body == "loop"
        together = 132 * (32 // launch.num_warps)
        assert together * classes * 2 <= 25_000_000


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 19, 128, 150, 8142])
@pytest.mark.parametrize("positions", [1, 2, 49, 512, 512 * 512])
def test_tiles_launch(positions, classes, contiguous):
    for itemsize in (2, 4):
        launch = backend._tiles_launch(classes, positions, contiguous, itemsize)
        assert all(size >= 1 and size & (size - 1) == 0 for size in launch)
        assert launch.num_warps <= 8
        assert launch.repeat * launch.lanes * launch.block_k <= 32 * 32 * launch.num_warps
    sums = backend._sums_launch(classes, positions, contiguous)
    assert all(size >= 1 and size & (size - 1) == 0 for size in sums)
    assert sums.block_c * sums.block_k <= 2048


def test_segmentation_maps_stay_in_the_cache():
    """The classes of Cityscapes, PASCAL VOC and ADE20K, between their first and their second read."""
    for classes, itemsize in ((19, 2), (21, 2), (150, 2), (19, 4), (150, 4)):
        launch = backend._tiles_launch(classes, 512 * 512, False, itemsize)
        assert launch.block_k == 128
        assert 132 * 16 / launch.num_warps * launch.block_k * classes * itemsize <= 25_000_000
        assert -(-classes // (launch.repeat * launch.lanes)) * launch.repeat * launch.lanes <= 1.3 * classes


@pytest.mark.parametrize("blocks", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("class_tiles", [1, 32, 5000])
def test_class_vector_gradients_are_split_into_a_bounded_number_of_programs(blocks, class_tiles):
    per_program = backend._blocks_per_program(blocks, class_tiles)
    programs = -(-blocks // per_program)
    assert 1 <= per_program <= blocks
    assert programs * per_program >= blocks
    assert programs * class_tiles <= max(backend._PARTIAL_PROGRAMS, class_tiles)
