"""The CUDA kernels of contrastive losses without a GPU, on the emulator (tests/emulator), in processes of their own."""

from __future__ import annotations

from test_cuda import passed, pytestmark, run_on_the_emulator

__all__ = ["pytestmark"]


def test_kernels_of_a_block_on_the_emulator():
    assert passed(run_on_the_emulator("cuda_contrastive_emulated.py")) > 50


def test_every_block_of_the_cpu_kernels_on_the_emulator():
    others = "threads or instruction_sets"
    assert passed(run_on_the_emulator("test_contrastive_native.py", "-k", f"not ({others})")) > 200
