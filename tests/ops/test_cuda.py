"""The CUDA kernels without a GPU: compiled for the CPU with emulated threads (tests/emulator), each in a process.

What this cannot show -- the real machine's timing, memory model and conversions -- is for scripts/gpu_check.sh.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="the emulator needs a C++ compiler"),
]

#: Largest cluster, shared memory per block and per processor: a real chip, and small ones on which the tests' rows need
#: clusters, or two passes.
DEVICES = {
    "sm_90": "8 232448 233472",
    "clusters of 4 and 8 blocks": "8 16384 32768",
    "two passes": "1 8192 12000",
}


def run_on_the_emulator(file: str, *options: str, device: str = "sm_90", fused: bool = False) -> str:
    environment = {
        **({"LTK_EMULATED_FUSED": "1"} if fused else {}),
        **os.environ,
        "LTK_EMULATED_DEVICE": DEVICES[device],
        "LT_KERNELS_TEST_BACKENDS": "native",
        "OMP_NUM_THREADS": "1",
    }
    paths = [str(HERE.parent / "emulator"), str(HERE.parent), str(HERE.parent.parent)]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    plugins = ["-p", "no:cacheprovider", "-p", "emulated_cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", *plugins, *options, str(HERE / file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-6000:]
    assert "skipped" not in report.splitlines()[-1]
    return report


def passed(report: str) -> int:
    found = re.search(r"(\d+) passed", report)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_on_the_emulator(device):
    assert passed(run_on_the_emulator("cuda_emulated.py", device=device)) > 300


def test_every_generic_case_on_the_emulator():
    """The suite of all backends, but for what compares CPU backends, threads or compiled code. Products are fused with
    sums, as nvcc does it: the bits of a logit must not depend on which kernel computes it."""
    elsewhere = "TestProperties or same_bits or opcheck or compile or gradcheck"
    assert passed(run_on_the_emulator("test_margin_cross_entropy.py", "-k", f"not ({elsewhere})", fused=True)) > 800


def test_clusters_that_do_not_fit_the_chip():
    assert passed(run_on_the_emulator("cuda_clusters_emulated.py")) == 18
