"""Which instructions the native kernels use; ``--engine=default`` and ``--engine=avx2`` run the kernels of each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lt_kernels

ORDER = ["default", "avx2", "avx512"]


def info(capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LT_KERNELS_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "lt_kernels", "info"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("capability", ORDER)
def test_what_the_processor_has_runs_and_nothing_else(capability):
    best = lt_kernels.info()["extension"]["cpu_capability"]
    result = info(capability)
    if ORDER.index(capability) <= ORDER.index(best):
        assert result.returncode == 0, result.stderr
        assert capability in result.stdout
    else:
        assert result.returncode != 0
        assert f"this processor does not run '{capability}'" in result.stderr


def test_an_unknown_name_is_an_error():
    result = info("sse9")
    assert result.returncode != 0
    assert "LT_KERNELS_CPU_CAPABILITY: got 'sse9', expected 'default', 'avx2' or 'avx512'" in result.stderr
