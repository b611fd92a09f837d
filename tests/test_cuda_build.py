"""Which GPUs a CUDA build runs on, and what setup.py refuses, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lt_kernels.ops import _native

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),  # machine code runs on later chips of the same major version
        ("8.6", (8, 0), False),
        ("9.0", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("10.0+PTX", (9, 0), False),
        ("8.0 9.0 10.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("Hopper", (9, 0), True),  # left to torch's builder
    ],
)
def test_which_gpus_a_build_runs_on(architectures, capability, runs):
    assert _native.runs_on(architectures.split(), capability) is runs


def build(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_asking_for_cuda_without_it_is_an_error():
    result = build(LT_KERNELS_BUILD="cuda")
    assert result.returncode != 0
    assert "LT_KERNELS_BUILD=cuda: torch was built without CUDA" in result.stderr


def test_an_architecture_that_is_too_old_is_an_error():
    result = build(LT_KERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="7.5;8.0")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST names 7.5" in result.stderr


def test_an_unknown_build_is_an_error():
    result = build(LT_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "got 'gpu', expected" in result.stderr
