"""A pytest plugin for runs with a time limit (``-p limited_run``): the most informative tests first, and a record.

One test of every kind (function, dtype and operator) comes first, then one of every backend and layout of each kind,
then a second of each kind, and so on, in an order that depends on names alone: a limit leaves a sample of everything,
and the tests it left no time for are "not run". With
pytest-xdist a test that brings its process down, or that takes too long, fails alone, since the process is replaced.
The exit status is 75 if nothing failed and some tests were not run.

The record says of Triton's kernels how many were compiled and how many came out of its cache on disk
(``TRITON_CACHE_DIR``): compiling takes most of a first run on a device.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: States of a test; "not run" are those that the time limit left no time for.
STATES = ("passed", "failed", "skipped", "not run")
IN_PART = 75  # exit status where no test failed, and not all were run
#: Words of a test's ids that make it another kind: dtypes, and families of operators (tests/kernels/_works.py).
KINDS = ("bf16", "fp16", "fp32", "rows", "linear", "experts", "contrastive", "recipes")
#: Words that say which kernel of a kind is launched: backends, ways through a row, strategies, layouts.
KERNELS = (
    *("triton", "native", "loop", "parts", "one part", "narrow", "wide rows", "wide tiles", "one split", "splits"),
    *("tiled", "materialize", "chunked", "few classes", "classes", "pixels", "samples first", "classes first"),
    *("channels last", "transposed", "expanded", "padded", "every other row", "every other column", "odd", "window"),
)
NOT_RUN = "not run: the time limit came"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("limited run")
    group.addoption("--seconds", type=float, default=math.inf, metavar="S", help="start no test after this")
    group.addoption("--seconds-per-test", type=float, default=120.0, metavar="S", help="limit of a test (120)")
    group.addoption("--results", type=Path, metavar="FILE", help="write states, failures and what took longest")
    group.addoption(
        "--select",
        action="append",
        default=[],
        metavar="TEST[ID,...]",
        help="only tests of this function whose parameters have all these ids (may be given several times)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LimitedRun(config), "limited run")


def ids_of(item: pytest.Item) -> list[str]:
    ids = [str(each) for each in item.callspec._idlist] if hasattr(item, "callspec") else []
    return [*ids, *(word for each in ids for word in each.split("-"))]


def selected(function: str, ids: list[str], choices: list[str]) -> bool:
    """Whether one of the choices names a test."""
    for choice in choices:
        name, _, wanted = choice.removesuffix("]").partition("[")
        if name == function and set(filter(None, wanted.split(","))) <= set(ids):
            return True
    return not choices


def kind_of(name: str, words: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    """Return a test's function and those of its ids that are among the words."""
    function, _, ids = name.partition("[")
    return (function, *(word for word in ids.rstrip("]").split("-") if word in words))


def in_order(names: list[str]) -> list[str]:
    """Sort names: one test of every kind first, one of every kernel of each kind, then a second of each kind, ...

    Tests of one kind are in the order of a hash of their names, so that neighbours in a list of cases come apart.
    """
    places: Counter[tuple[str, ...]] = Counter()
    seen: set[tuple[str, ...]] = set()
    ranked = []
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):
        kind, kernel = kind_of(name), kind_of(name, KINDS + KERNELS)
        place = places[kind] + 1 if kernel in seen else min(places[kind], 1)
        ranked.append((place, name))
        places[kind] += 1
        seen.add(kernel)
    position = {name: index for index, name in enumerate(names)}
    return [name for _, name in sorted(ranked, key=lambda item: (item[0], position[item[1]]))]


def _device_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:  # an illegal access: nothing works in this process from here on
        return False
    return True


class Kernels:
    """Kernels that Triton compiled or found in its cache, as it reports them to a listener."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.compiled: list[str] = []
        self.listening = False

    def listen(self) -> None:
        """Listen as soon as something else has imported Triton; a listener that was there is told, too."""
        compilation = getattr(getattr(sys.modules.get("triton"), "knobs", None), "compilation", None)
        if self.listening or compilation is None:
            return
        self.listening, other = True, compilation.listener

        def listener(*, src: Any, cache_hit: bool, **others: Any) -> None:
            (self.found if cache_hit else self.compiled).append(str(getattr(src, "name", "?")))
            if other is not None:
                other(src=src, cache_hit=cache_hit, **others)

        compilation.listener = listener

    def take(self) -> dict[str, list[str]]:
        """Return the names since the last time."""
        taken = {"found": self.found, "compiled": self.compiled}
        self.found, self.compiled = [], []
        return taken


class LimitedRun:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.started = time.time()
        self.is_worker = hasattr(config, "workerinput")
        self.deadline = self.started + config.getoption("--seconds")
        if self.is_worker:
            self.deadline = config.workerinput["deadline"]  # type: ignore[attr-defined]
        self.results: dict[str, dict[str, Any]] = {}
        self.kernels = Kernels()
        self.found: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["deadline"] = self.deadline

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        choices = self.config.getoption("--select")
        by_name = {
            item.nodeid: item
            for item in items
            if selected(getattr(item, "originalname", None) or item.name, ids_of(item), choices)
        }
        items[:] = [by_name[name] for name in in_order(list(by_name))]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        limit = self.config.getoption("--seconds-per-test")
        if self.is_worker:  # whose process is replaced
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            return (yield)
        finally:
            if self.is_worker:
                faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.time() > self.deadline:
            pytest.skip(NOT_RUN)
        self.kernels.listen()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        report.user_properties.append(("backend", str(parameters.get("backend", "any"))))
        report.kernels = self.kernels.take()  # with xdist it travels with the report
        if self.is_worker and report.failed and not _device_answers():
            os._exit(1)
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        kernels = getattr(report, "kernels", {})  # a process that went down leaves none
        self.found.update(kernels.get("found", ()))
        self.compiled.update(kernels.get("compiled", ()))
        result = self.results.setdefault(report.nodeid, {"state": "passed", "seconds": 0.0, "message": ""})
        result["seconds"] += getattr(report, "duration", 0.0)
        result["backend"] = dict(report.user_properties).get("backend", "any")
        if report.failed:
            result.update(state="failed", message=str(report.longrepr)[-4000:])
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            result.update(state="not run" if reason == NOT_RUN else "skipped", message=reason)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.is_worker or self.config.option.collectonly:
            return
        tally = Counter(result["state"] for result in self.results.values())
        if exitstatus == 0 and not tally["passed"]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif exitstatus == 0 and tally["not run"]:
            session.exitstatus = IN_PART
        if path := self.config.getoption("--results"):
            path.write_text(json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        package = sys.modules.get("lt_kernels")
        backends = dict.fromkeys(result["backend"] for result in self.results.values())
        counts = {
            backend: {
                state: sum((r["backend"], r["state"]) == (backend, state) for r in self.results.values())
                for state in STATES
            }
            for backend in backends
        }
        slowest = sorted(self.results.items(), key=lambda item: -item[1]["seconds"])[:20]
        return {
            "seconds": round(time.time() - self.started, 1),
            "counts": counts,
            **{
                state.replace(" ", "_"): {
                    name: result["message"] for name, result in self.results.items() if result["state"] == state
                }
                for state in STATES[1:]
            },
            "kernels": {
                "found in the cache": self.found.total(),
                "compiled": self.compiled.total(),
                "compiled by name": dict(self.compiled.most_common()),
            },
            "slowest": [{"name": name, **result} for name, result in slowest],
            "info": package.info() if package else None,
        }

    def pytest_unconfigure(self) -> None:
        if not self.is_worker and self.results:
            tally = Counter(result["state"] for result in self.results.values())
            run = len(self.results) - tally["not run"]
            seconds = time.time() - self.started
            line = f"{run} of {len(self.results)} tests run in {seconds:.0f} s, {tally['failed']} failed"
            if self.found or self.compiled:
                line += f"; {self.compiled.total()} kernels compiled, {self.found.total()} found in the cache"
            print(line, flush=True)
