"""The native kernels of every instruction set that this processor runs, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ORDER = ["default", "avx2", "avx512"]


def run(code: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LT_KERNELS_CPU_CAPABILITY": capability, "LT_KERNELS_TEST_BACKENDS": "native"}
    return subprocess.run([sys.executable, *code.split()], capture_output=True, text=True, env=environment, check=False)


def best() -> str:
    result = subprocess.run(
        [sys.executable, "-c", "import lt_kernels; print(lt_kernels.info()['extension']['cpu_capability'])"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "LT_KERNELS_CPU_CAPABILITY"},
        check=True,
    )
    return result.stdout.strip()


@pytest.mark.parametrize("capability", ORDER)
def test_every_case(capability):
    if ORDER.index(capability) > ORDER.index(best()):
        result = run("-m lt_kernels info", capability)
        assert result.returncode != 0
        assert f"this processor does not run '{capability}'" in result.stderr
        return
    result = run(
        f"-m pytest -q -p no:cacheprovider {TESTS / 'test_margin_cross_entropy.py'} -k value_and_every_gradient",
        capability,
    )
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 100


def test_an_unknown_name_is_an_error():
    result = run("-m lt_kernels info", "sse9")
    assert result.returncode != 0
    assert "LT_KERNELS_CPU_CAPABILITY: got 'sse9', expected 'default', 'avx2' or 'avx512'" in result.stderr
