"""The tiled strategy of linear heads without a GPU: kernels in the interpreter (a process of its own), launch table."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton")

import torch
from test_triton import run_in_the_interpreter

from lt_kernels.ops.linear_margin_cross_entropy import triton as backend

#: Shared memory of a multiprocessor's program in bytes, by architecture (0: AMD's).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 0: 64}


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    report = run_in_the_interpreter("triton_tiled_interpreted.py")
    assert int(re.search(r"(\d+) passed", report)[1]) > 240, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("width", [1, 16, 33, 64, 96, 128, 200, 256, 300, 512])
def test_tiles_are_possible(width, architecture):
    for itemsize, tf32 in ((2, False), (4, False), (4, True)):
        for options in range(4):
            launches = backend._launches(width, itemsize, tf32, options, architecture)
            for launch in launches:
                for size in (launch.block_n, launch.block_c, launch.num_warps):
                    assert size & (size - 1) == 0
                assert min(launch.block_n, launch.block_c) >= 16
                assert backend._PADDING % launch.block_n == 0
            for launch in (launches.forward, launches.grad_input):  # what the pipeline and the resident block take
                vectors = launch.block_c * max(launch.num_stages - 1, 1)
                assert vectors * backend._block_d(width) * itemsize <= SHARED[architecture] * 1024


def test_more_columns_than_the_table_has_are_refused():
    with pytest.raises(ValueError, match="got 513 columns, expected at most 512"):
        backend._launches(513, 2, False, 0, 90)


@pytest.mark.parametrize("blocks", [1, 2, 64, 132, 133, 1000])
@pytest.mark.parametrize("tiles", [1, 2, 64, 65, 5000])
def test_splits_cover_the_tiles(tiles, blocks):
    for together in (1, 2):
        for most in (1, 64):
            per_split = backend._per_split(blocks, tiles, together, most)
            splits = -(-tiles // per_split)
            assert 1 <= splits <= most
            assert (splits - 1) * per_split < tiles <= splits * per_split


def test_few_rows_fill_the_machine():
    for rows, classes in ((128, 100_000), (256, 8142), (1024, 8142)):
        launch = backend._launches(128, 2, False, 0, 90).forward
        blocks, tiles = -(-rows // launch.block_n), -(-classes // launch.block_c)
        splits = -(-tiles // backend._per_split(blocks, tiles, launch.together))
        assert blocks * splits >= 0.9 * min(132, 64 * blocks)


def test_partial_gradients_have_a_bound():
    assert backend._most_splits(8192 * 128) == 64
    assert backend._most_splits(1_000_000 * 256) == 1


def test_float32_products_are_as_exact_as_those_of_torch():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((False, "ieee"), (True, "tf32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert backend._precision(torch.float32) == precision
            assert backend._precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.slow
def test_chunked_and_tiled_heads_in_the_interpreter():
    """The public function over the Triton backend: every way to cut, gradients from backward and from forward."""
    values = "test_value_and_every_gradient and fp32 and not inat18"
    ways = "(rows or classes or recompute) and (learnable or everything or probabilities or cosine or smoothed or none)"
    report = run_in_the_interpreter("test_linear_margin_cross_entropy.py", "-k", f"{values} and {ways}")
    assert int(re.search(r"(\d+) passed", report)[1]) > 50, report[-1000:]
    report = run_in_the_interpreter("test_linear_margin_cross_entropy.py", "-k", "tiled_runs_where_asked_for")
    assert int(re.search(r"(\d+) passed", report)[1]) >= 3, report[-1000:]


TF32 = """
import torch
from lt_kernels.ops.linear_margin_cross_entropy import triton as backend
assert backend._precision(torch.float32) == "ieee"
{setting}
assert backend._precision(torch.float32) == "tf32"
assert backend._precision(torch.bfloat16) == "ieee"
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_float32_products_follow_torch(setting):
    """However TF32 was allowed: torch's older flag raises once the newer one has been set."""
    if "fp32_precision" in setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the older flag only")
    result = subprocess.run(
        [sys.executable, "-c", TF32.format(setting=setting)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
