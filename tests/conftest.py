"""The engine, the backends and the device that tests run on: see ``_engines``.

LT_KERNELS_TEST_BACKENDS and LT_KERNELS_TEST_DEVICE replace those of the engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: OpenMP's threads sleep while they wait. Those of several test processes on the same
# processors would spend most of the time spinning for one another.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import _engines
import pytest
import torch
from _engines import DTYPES

import lt_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=[name for name in _engines.ENGINES if name != "cpu"], help="what runs kernels")


def pytest_configure(config: pytest.Config) -> None:
    _engines.start(config.getoption("--engine"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not import files of which an engine runs nothing."""
    is_file = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if is_file and not _engines.runs(collection_path) else None


def _directly_parametrized(metafunc: pytest.Metafunc) -> set[str]:
    names: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        names.update([mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0])
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chips = dict(_engines.ENGINE.chips)
    choices = {"dtype": DTYPES, "backend": {name: name for name in _engines.ENGINE.backends}, "chip": chips}
    for name in ("dtype", "backend", "chip"):
        if name in metafunc.fixturenames and name not in _directly_parametrized(metafunc) and choices[name]:
            metafunc.parametrize(name, choices[name].values(), ids=choices[name], indirect=True)


def _impossible(item: pytest.Item) -> bool:
    """Whether a test cannot be run by this engine."""
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend")
    if backend == "triton" and not {"fp64", torch.float64}.isdisjoint(
        value for value in parameters.values() if isinstance(value, str | torch.dtype)
    ):
        return True  # Triton kernels take no float64
    if "tiled" in (parameters.get("mode"), parameters.get("strategy")) and backend != "triton":
        return True
    only = item.get_closest_marker("backends")
    if only is not None and (backend or _engines.ENGINE.backends[0]) not in only.args:
        return True
    return item.get_closest_marker("gpu") is not None and _engines.ENGINE.device != "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        (kept if _engines.runs(item.path, item.name) and not _impossible(item) else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run in which nothing passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    collecting = session.config.option.collectonly or hasattr(session.config, "workerinput")
    if exitstatus == 0 and reporter is not None and not collecting and not reporter.stats.get("passed"):
        reporter.write_line("no test passed", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lt_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    return _engines.ENGINE.device


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chip that is emulated, or the one there is."""
    if hasattr(request, "param"):
        monkeypatch.setenv("LTK_EMULATED_DEVICE", request.param)
