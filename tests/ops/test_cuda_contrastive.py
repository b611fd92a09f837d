"""The CUDA kernels of contrastive losses without a GPU, on the emulator (tests/emulator), in processes of their own."""

from __future__ import annotations

from test_cuda import passed, pytestmark, run_on_the_emulator

__all__ = ["pytestmark"]


def test_kernels_of_a_block_on_the_emulator():
    assert passed(run_on_the_emulator("cuda_contrastive_emulated.py")) > 50


def test_every_block_of_the_cpu_kernels_on_the_emulator():
    others = "threads or instruction_sets"
    assert passed(run_on_the_emulator("test_contrastive_native.py", "-k", f"not ({others})")) > 200


def test_every_generic_case_on_the_emulator():
    """The suite of all backends, but for what compares no kernels, or compiled code."""
    elsewhere = "chunks_are_bounded or bad_input or opcheck or compile or gradcheck or by_name"
    assert passed(run_on_the_emulator("test_partitioned_logsumexp.py", "-k", f"not ({elsewhere})")) > 1000
