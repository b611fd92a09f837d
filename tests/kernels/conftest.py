"""Fixtures of the kernel suite. Without an engine only the tests of pure functions are collected here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _engines
import pytest
import torch
from _layouts import nan_allocations

#: Files of tests of pure functions, which need no engine.
PURE = ("test_launches.py", "test_grids.py")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave a file to the engines that can run it; without an engine, what a device is tested for runs in part."""
    engine, name = _engines.ENGINE.name, collection_path.name
    if collection_path.suffix != ".py":
        return None
    if name in PURE:
        return True if engine != "cpu" else None
    if name.startswith("test_device_"):
        return True if engine not in ("cpu", "gpu") else None
    return True if engine not in ("interpreter", "emulator", "gpu") else None


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the interpreter every allocation of a launcher is NaN among NaN; at least one must be made."""
    if _engines.ENGINE.name != "interpreter":
        yield
        return
    with nan_allocations() as guards:
        yield
    assert guards or request.node.get_closest_marker("allocates_nothing"), "no launcher allocated anything"


@pytest.fixture
def emptied() -> Iterator[None]:
    """Give memory back: other processes share the device."""
    yield
    torch.cuda.empty_cache()
