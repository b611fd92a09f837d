"""The partitioned log-sum-exp in Triton without a GPU: kernels in the interpreter (in a process), launch table."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton")

import torch
from test_triton import run_in_the_interpreter

from lt_kernels.ops.partitioned_logsumexp import triton as backend
from lt_kernels.ops.partitioned_logsumexp.arguments import Arguments

#: Shared memory of a multiprocessor's program in kilobytes, by architecture (0: AMD's).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 0: 64}


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    report = run_in_the_interpreter("triton_contrastive_interpreted.py")
    assert int(re.search(r"(\d+) passed", report)[1]) > 150, report[-1000:]
    assert "skipped" not in report.splitlines()[-1]


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("width", [1, 16, 33, 64, 96, 128, 200, 256])
def test_tiles_are_possible(width, architecture):
    for itemsize, tf32 in ((2, False), (4, False), (4, True)):
        launches = backend._launches(width, itemsize, tf32, architecture)
        for launch in launches:
            if launch is None:
                continue
            for size in (launch.block_n, launch.block_c, launch.num_warps):
                assert size & (size - 1) == 0
            assert min(launch.block_n, launch.block_c) >= 16
            assert backend._PADDING % launch.block_n == backend._PADDING % launch.block_c == 0
            resident, moving = sorted((launch.block_n, launch.block_c), reverse=True)
            vectors = resident + moving * max(launch.num_stages, 1)
            if architecture == 0:  # what is resident is in registers
                vectors = moving
            assert vectors * backend._block_d(width) * itemsize <= SHARED[architecture] * 1024


def test_more_features_than_the_table_has_are_refused():
    with pytest.raises(ValueError, match="got 257 columns, expected at most 256"):
        backend._launches(257, 2, False, 90)


@pytest.mark.parametrize("columns", [1, 8, 500, 512, 513, 4096, 100_000])
def test_a_row_fills_the_lanes_of_a_block(columns):
    launch = backend._block_launch(columns)
    assert launch["LANES"] == 32 * launch["num_warps"]
    assert launch["num_warps"] == 1 or launch["LANES"] * launch["GROUP"] < 2 * columns


def test_exponentials_are_relative_to_a_bound_only_where_there_is_one():
    def constant(scale: float = 30.0, normalized: bool = True, **others: torch.Tensor) -> bool:
        x, label = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int32)
        vectors = {name: others.get(name) for name in ("key_bias", "key_scale", "learned_scale")}
        settings = {"scale": scale, "key_grad_begin": 0, "key_grad_end": 2, "normalized": normalized}
        return backend._constant(Arguments(x, x, label, label, None, **vectors, **settings))

    assert constant()
    assert constant(-30.0)
    assert not constant(30.1)
    assert not constant(normalized=False)
    for name in ("key_bias", "key_scale", "learned_scale"):
        assert not constant(**{name: torch.ones(2)})
