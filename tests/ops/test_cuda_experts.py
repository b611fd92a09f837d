"""The CUDA kernels of experts without a GPU, on the emulator (tests/emulator), each in a process of its own."""

from __future__ import annotations

import pytest
from test_cuda import passed, pytestmark, run_on_the_emulator

__all__ = ["pytestmark"]

#: Other functions, other backends, compiled code, and what compares CPU threads.
ELSEWHERE = "linear or bad_input or by_name or checks_on or deterministic or opcheck or compile or gradcheck"


@pytest.mark.parametrize("device", ["sm_90", "two passes"])
def test_kernels_of_experts_on_the_emulator(device):
    assert passed(run_on_the_emulator("cuda_experts_emulated.py", device=device)) > 150


def test_every_generic_case_of_fusion_on_the_emulator():
    assert passed(run_on_the_emulator("test_expert_fusion.py", "-k", f"not ({ELSEWHERE})", fused=True)) > 100


def test_every_generic_case_of_divergences_on_the_emulator():
    assert passed(run_on_the_emulator("test_expert_divergence.py", "-k", f"not ({ELSEWHERE})", fused=True)) > 200
