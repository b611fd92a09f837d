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
    assert int(re.search(r"(\d+) passed", report)[1]) > 300, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.slow
def test_every_generic_case_in_the_interpreter():
    """The suite of all backends, but for what needs float64 or the other backends (and is run for them elsewhere)."""
    elsewhere = "fp64 or TestProperties or gradcheck or same_bits or opcheck or compile"
    report = run_in_the_interpreter("test_margin_cross_entropy.py", "-k", f"not ({elsewhere})")
    assert int(re.search(r"(\d+) passed", report)[1]) > 600, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [129, 1000, 8142, 8192, 8199, 21841, 32768, 32769, 65536, 1_000_000])
def test_rows_launch_covers_the_row(classes, itemsize):
    for aligned in (False, True):
        for hungry in range(5):
            launch = backend._rows_launch(classes, itemsize, aligned, hungry)
            assert launch.group == (16 // itemsize if aligned else 1)
            assert launch.block & (launch.block - 1) == 0
            assert launch.block % launch.group == 0
            assert 1 <= launch.num_warps <= 32
            if launch.one_tile:  # every whole group, wherever the row starts
                assert launch.block >= classes // launch.group * launch.group
                assert launch.block <= 32768
            else:
                assert launch.block <= 8192
            assert launch.block // (32 * launch.num_warps) <= 64
        backward = backend._rows_backward_launch(classes, itemsize, aligned)
        assert backward.block <= 4096
        assert backward.block % backward.group == 0


def test_one_pass_at_the_sizes_that_matter():
    assert backend._rows_launch(8142, 2, True).one_tile
    assert backend._rows_launch(32768, 2, True).one_tile
    assert not backend._rows_launch(32768 + 8, 2, True).one_tile
    assert backend._rows_launch(8142, 2, True).block == 8192


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 19, 128, 8142])
@pytest.mark.parametrize("positions", [1, 49, 512, 512 * 512])
def test_tiles_launch(positions, classes, contiguous):
    launch = backend._tiles_launch(classes, positions, contiguous)
    for block in (launch.block_c, launch.block_k):
        assert block >= 1
        assert block & (block - 1) == 0
    assert launch.block_c * launch.block_k <= 2048


@pytest.mark.parametrize("blocks", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("class_tiles", [1, 32, 5000])
def test_class_vector_gradients_are_split_into_a_bounded_number_of_programs(blocks, class_tiles):
    per_program = backend._blocks_per_program(blocks, class_tiles)
    programs = -(-blocks // per_program)
    assert 1 <= per_program <= blocks
    assert programs * per_program >= blocks
    assert programs * class_tiles <= max(backend._PARTIAL_PROGRAMS, class_tiles)
