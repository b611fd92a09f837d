"""Which backends and device the generic tests run on.

LT_KERNELS_TEST_BACKENDS (default "reference,native": both must be there, or the tests fail) and LT_KERNELS_TEST_DEVICE
(default "cpu") choose; tools/gpu_check.sh sets "triton" or "triton,native", and "cuda". Tests with the marker ``gpu``
are skipped where there is no CUDA device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported: OpenMP's threads sleep while they wait. Those of several test processes on the same
# processors would spend most of the time spinning for one another.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cases import DTYPES

import lt_kernels

BACKENDS = os.environ.get("LT_KERNELS_TEST_BACKENDS", "reference,native").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device is available")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lt_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    return os.environ.get("LT_KERNELS_TEST_DEVICE", "cpu")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    if backend == "triton" and request.param == "fp64":
        pytest.skip("Triton kernels take no float64")
    return DTYPES[request.param]
