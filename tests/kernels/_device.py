"""What the tests of a device have in common: parameters with readable ids, streams, graphs and memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import lt_kernels

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
HALF_AND_SINGLE = {name: DTYPES[name] for name in ("bf16", "fp32")}
REDUCTIONS = {"mean": "mean", "none": "none"}
POLICIES = {"one_pass": "one_pass", "recompute": "recompute"}


def parametrized(
    *, anywhere: bool = False, large: bool = False, **parameters: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test over argument name -> readable id -> value.

    ``anywhere``: it runs without a CUDA device too. ``large``: it takes so much of the device's memory that no other
    large test may run at the same time.
    """

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        for name, choices in reversed(parameters.items()):
            test = pytest.mark.parametrize(name, list(choices.values()), ids=list(choices))(test)
        test = pytest.mark.usefixtures("backend")(test)
        if large:
            test = pytest.mark.xdist_group("large")(pytest.mark.usefixtures("emptied")(test))
        return test if anywhere else pytest.mark.gpu(test)

    return mark


@contextmanager
def checks_on() -> Iterator[None]:
    lt_kernels.set_checks(True)
    try:
        yield
    finally:
        lt_kernels.set_checks(False)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, and refuse torch operators whose bits vary from run to run."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())):
            differ = int((a != b).sum())
            raise AssertionError(f"{what}: {differ} of {a.numel()} elements of result {position} differ")


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    """Raise where the host waits for the device; torch warns once that it does not detect every case."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def need_free_memory(size: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of free device memory, {free / 2**30:.0f} are")


def peak_memory_beside(run: Callable[[], Any], gradients: int) -> int:
    """Return how many bytes a second run allocates at most, without ``gradients``."""
    run()  # compiles, and loads modules
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradients


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Record a run into a graph; return it with the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, and loads modules
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


def run_late(values: Tensor, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Run while ``values`` arrive 30 ms later on the same stream; a launch on another one would read NaN."""
    kept = values.detach().clone()
    values.detach().fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        values.detach().copy_(kept)
        actual = run()
    stream.synchronize()
    return actual
