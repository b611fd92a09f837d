"""Run the device checks of ``tests/gpu/device_checks.py`` with nothing installed but torch (and Triton).

Several processes share the device, and the time limit. One check of every kind and dtype comes first, then a second of
each, and so on in an order that depends on names alone: a limit leaves a sample of everything, and what it left no time
for is "not run". A check that brings its process down, or that takes too long, fails alone: the process is replaced.
Writes JSON; exit status 1 if a check failed or none passed, 75 if none failed and some were not run.

    python3 tools/run_device_checks.py --device cuda --backend triton,native --jobs 16 --json checks.json
    python3 tools/run_device_checks.py --device cpu --backend native --match bad_targets
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
import zlib
from collections import Counter, deque
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import SkipTest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

import torch  # noqa: E402

import lt_kernels  # noqa: E402

#: Of a check; "not run" are those that the time limit left no time for.
STATES = ("passed", "failed", "skipped", "not run")
IN_PART = 75  # exit status where no check failed, and not all were run
Task = tuple[str, str]  # backend, name of the check


@dataclass
class Result:
    backend: str
    name: str
    state: str
    seconds: float = 0.0
    message: str = ""


def run(module: str, task: Task, device: str) -> Result:
    """Run one check in this process."""
    backend, name = task
    started = time.perf_counter()
    state, message = "passed", ""
    try:
        importlib.import_module(module).CHECKS[name].run(backend, device)
        _synchronise(device)
    except SkipTest as reason:
        state, message = "skipped", str(reason)
    except Exception as error:
        state, message = "failed", f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            message += "\n" + traceback.format_exc()[-4000:]
    return Result(backend, name, state, round(time.perf_counter() - started, 3), message)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _work(pipe: Connection, module: str, device: str) -> None:
    """Run what comes through ``pipe`` until None does, or the device no longer answers."""
    if device.startswith("cuda"):
        torch.set_num_threads(1)
        torch.cuda.init()
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        result = run(module, task, device)
        pipe.send(result)
        if result.state == "failed":
            try:
                _synchronise(device)
            except Exception:  # an illegal access: nothing works in this process from here on
                os._exit(1)


class Worker:
    """A process that runs checks, replaced when it ends or takes too long."""

    def __init__(self, module: str, device: str) -> None:
        self.arguments = (module, device)
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it has imported everything: that is not part of a check's time

    def run(self, task: Task, limit: float, cut: bool = False) -> Result:
        """``cut``: after ``limit`` the time of all is over, which says nothing of this check."""
        started = time.perf_counter()
        try:
            if self.process is None or not self.process.is_alive():
                self.start()
            started = time.perf_counter()
            self.pipe.send(task)
            if self.pipe.poll(limit):
                result: Result = self.pipe.recv()
                return result
            message = f"took more than {limit:.0f} s"
            self.process.kill()
            if cut:
                self.process.join()
                return Result(*task, "not run", round(limit, 3), f"the time limit came after {limit:.0f} s of it")
        except (EOFError, OSError):
            message = "its process ended"
        self.process.join()
        message += f" (status {self.process.exitcode})"
        return Result(*task, "failed", round(time.perf_counter() - started, 3), message)

    def stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.pipe.send(None)
            self.process.join()


def in_order(names: list[str]) -> list[str]:
    """One check of every kind (function and dtype) first, then a second of each, ...; of a kind, in the order of a hash
    of their names, so that neighbours in the list of cases are no neighbours here."""
    places: Counter[tuple[str, ...]] = Counter()
    ranked = []
    for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):
        function, _, ids = name.partition("[")
        kind = (function, *(word for word in ids.rstrip("]").split("-") if word in ("bf16", "fp16", "fp32")))
        ranked.append((places[kind], name))
        places[kind] += 1
    position = {name: index for index, name in enumerate(names)}
    return [name for _, name in sorted(ranked, key=lambda item: (item[0], position[item[1]]))]


def run_all(
    tasks: list[Task], *, module: str, device: str, jobs: int, seconds: float, seconds_per_check: float
) -> list[Result]:
    """Run ``tasks`` in ``jobs`` processes (0: in this one). One of them alone takes those marked large, first."""
    checks = importlib.import_module(module).CHECKS
    large = deque(task for task in tasks if checks[task[1]].large)
    others = deque(task for task in tasks if not checks[task[1]].large)
    results: list[Result] = []
    deadline = time.perf_counter() + seconds

    def take(queues: tuple[deque[Task], ...]) -> Task | None:
        for queue in queues:
            try:
                return queue.popleft()
            except IndexError:
                continue
        return None

    def drive(queues: tuple[deque[Task], ...]) -> None:
        worker = Worker(module, device)
        while (task := take(queues)) is not None:
            left = deadline - time.perf_counter()
            if left <= 0:
                result = Result(*task, "not run")
            elif jobs == 0:
                result = run(module, task, device)
            else:
                result = worker.run(task, min(seconds_per_check, left + 5), cut=left + 5 < seconds_per_check)
            results.append(result)
            if result.state == "failed":
                message = " ".join(result.message.split())[:300]  # the first line may say nothing
                print(f"FAILED {result.backend}: {result.name}: {message}", flush=True)
        worker.stop()

    threads = [
        threading.Thread(target=drive, args=((large, others) if index == 0 else (others,),))
        for index in range(max(1, jobs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {task: position for position, task in enumerate(tasks)}
    return sorted(results, key=lambda result: order[result.backend, result.name])


def report(results: list[Result], unavailable: dict[str, str], device: str, seconds: float) -> dict[str, Any]:
    """What the JSON file says: counts by backend, everything that did not pass and why, and what took longest."""
    counts = {
        backend: {state: tally.get(state, 0) for state in STATES}
        for backend in dict.fromkeys(result.backend for result in results)
        for tally in [Counter(result.state for result in results if result.backend == backend)]
    }
    return {
        "device": device,
        "seconds": round(seconds, 1),
        "counts": counts,
        "unavailable_backends": unavailable,
        **{
            state.replace(" ", "_"): {
                f"{result.backend}: {result.name}": result.message for result in results if result.state == state
            }
            for state in STATES[1:]
        },
        "slowest": [asdict(result) for result in sorted(results, key=lambda result: -result.seconds)[:20]],
        "info": lt_kernels.info(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="triton,native", metavar="NAME[,NAME]", help="default: %(default)s")
    parser.add_argument("--match", default="", metavar="TEXT[,TEXT]", help="only checks whose name contains a TEXT")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1); 0: no other process")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="start no check after this")
    parser.add_argument("--seconds-per-check", type=float, default=120.0, metavar="S", help="limit of a check (120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what passed, failed, was skipped, and why")
    parser.add_argument("--module", default="device_checks", metavar="NAME", help="where CHECKS is (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names, and stop")
    options = parser.parse_args()
    words = options.match.split(",")
    names = [name for name in importlib.import_module(options.module).CHECKS if any(word in name for word in words)]
    names = in_order(names)
    if options.list:
        print("\n".join(names))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available", file=sys.stderr)
        return 1

    reasons = lt_kernels.info()["backends"]["margin_cross_entropy"][options.device]
    backends = options.backend.split(",")
    if unknown := set(backends) - set(reasons):
        parser.error(f"--backend: got {', '.join(sorted(unknown))}, expected some of {', '.join(reasons)}")
    unavailable = {backend: reasons[backend] for backend in backends if reasons[backend] is not None}
    for backend, reason in unavailable.items():
        print(f"WITHOUT {backend}: {reason}", flush=True)
    started = time.perf_counter()
    results = run_all(
        [(backend, name) for name in names for backend in backends if backend not in unavailable],
        module=options.module,
        device=options.device,
        jobs=options.jobs,
        seconds=options.seconds,
        seconds_per_check=options.seconds_per_check,
    )
    facts = report(results, unavailable, options.device, time.perf_counter() - started)
    for reason, count in Counter(result.message for result in results if result.state == "skipped").items():
        print(f"SKIPPED {count}: {reason}")
    for backend, counts in facts["counts"].items():
        print(f"{backend} on {options.device}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    tally = Counter(result.state for result in results)
    run = len(results) - tally["not run"]
    print(f"{run} of {len(results)} checks run in {facts['seconds']:.0f} s, {tally['failed']} failed")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if tally["failed"] or not tally["passed"]:
        return 1
    return IN_PART if tally["not run"] else 0


if __name__ == "__main__":
    sys.exit(main())
