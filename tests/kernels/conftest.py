"""Fixtures of the kernel suite. Without an engine only the tests of pure functions are collected here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _engines
import pytest
import torch
from _layouts import nan_allocations

#: Files whose tests need no engine.
PURE = ("test_launches.py", *(f"test_device_{what}.py" for what in ("rows", "linear", "experts", "contrastive")))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    engine = _engines.ENGINE.name
    if collection_path.suffix != ".py":
        return None
    if engine == "gpu":
        return True if collection_path.name == "test_launches.py" else None
    return True if (collection_path.name in PURE) != (engine == "cpu") else None


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the interpreter every allocation of a launcher is NaN among NaN; at least one must be made."""
    if _engines.ENGINE.name != "interpreter":
        yield
        return
    with nan_allocations() as guards:
        yield
    assert guards or request.node.get_closest_marker("allocates_nothing"), "no launcher allocated anything"


def run_in(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the order of programs (interpreter), or of threads and blocks (emulator)."""
    if _engines.ENGINE.name == "emulator":
        monkeypatch.setenv("LTK_EMULATED_ORDER", order)
    if _engines.ENGINE.name == "interpreter" and order == "reversed":
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        ascending = builder.set_grid_idx

        def descending(*index: int) -> None:
            ascending(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", descending)


@pytest.fixture
def emptied() -> Iterator[None]:
    """Give memory back: other processes share the device."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=["forward", "reversed"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(request.param, monkeypatch)


@pytest.fixture
def reversed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program first: ascending order may hide that a program reads what another one writes."""
    run_in("reversed", monkeypatch)
