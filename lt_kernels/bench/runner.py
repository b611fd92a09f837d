"""Choose, check and measure the providers of an op, and make records."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from .cases import Case, Inputs
from .op import COPY, DIRECTIONS, DTYPES, Cost, Op
from .ops import OPS
from .providers import Step, first_line
from .records import Record, device_name, device_slug, git_revision, is_ours, versions
from .timing import CLOCKS, Times, Timing, capture, inference_parts, measure, peak_bytes, quantile, training_parts

_EVERYTHING = "everything"  # stands for all providers in messages
Log = Callable[[str], None]
Keep = Callable[[list[Record]], None]


class BenchmarkError(RuntimeError):
    """One of our backends, or a provider asked for by name, failed or disagreed with float64."""


def unavailable_reason(op: str, provider: str, device: str) -> str | None:
    """Say why ``provider`` cannot be measured on ``device``; None where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    return OPS[op].providers[provider].unavailable(device)


def check_device(device: str) -> None:
    """ValueError unless ``device`` is "cpu", or "cuda" where there is one."""
    _choices("device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: no CUDA device is available")


def run(
    op: str,
    *,
    cases: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
    device: str = "cpu",
    repetitions: int = Timing.repetitions,
    seconds: float = Timing.seconds,
    limit: float = Timing.limit,
    clock: str = Timing.clock,
    budget: float | None = None,
    log: Log = lambda line: None,
    on_records: Keep = lambda records: None,
) -> list[Record]:
    """Measure an op and return the records; agreement with float64 is asserted before anything is timed.

    Headline cases come first, float16 last. A provider that fails or disagrees is left out of that case and dtype, with
    its message on ``log``. On a GPU with a budget, a case and dtype is measured without slow compilers first, and once
    more with them (all in turns again) if that fits.

    Args:
        op: a key of ``OPS``.
        cases: names; default those meant for the device. Names of other ops' cases are passed over, which is said.
        providers: names, likewise; one asked for by name must be available. Default: all available ones, except those
            that say why they are not measured, or not on a case, unasked. The op's floor is always measured.
        dtypes, directions: names; default those meant for the device (on a CPU, and for the case), and all.
        device: ``"cpu"`` or ``"cuda"``.
        repetitions, seconds, limit, clock: as in ``Timing``. By other clocks than "device", which a GPU has, the
            cases are those whose calls are plotted, and there is no direction "bwd".
        budget: seconds for everything; what does not fit is left out and named on ``log``. At least one provider of
            one case and dtype is measured.
        log: receives one line per step.
        on_records: receives the records of each case and dtype as soon as they exist; again with more, if there are.

    Raises:
        ValueError: an unknown name, or a provider asked for that cannot run; the message lists the choices.
        BenchmarkError: at the end, if one of our backends or a provider asked for by name failed somewhere.
    """
    spec = OPS[_choices("op", [op], OPS)[0]]
    any_dtype = bool(dtypes) or device != "cpu"
    dtypes = _choices("dtype", dtypes or spec.dtypes.get(device, DTYPES), DTYPES)
    directions = [name for name in _choices("direction", directions, DIRECTIONS) if name in spec.directions]
    check_device(device)
    _choices("clock", [clock], CLOCKS if device == "cuda" else ("device",))
    if clock != "device":
        directions = [name for name in directions if name != "bwd"]
    if repetitions < 1:
        raise ValueError(f"repetitions: got {repetitions}, expected at least 1")
    for name, value in (("seconds", seconds), ("limit", limit), ("budget", budget)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: got {value}, expected seconds, 0 or more")
    default_cases = [
        name for name, case in spec.cases.items() if device in (case.devices if clock == "device" else case.calls)
    ]
    case_names = _of_this_op("case", cases, spec, log) if cases else default_cases
    asked = _of_this_op("provider", providers, spec, log) if providers else None
    if not case_names or asked == [] or not directions:
        return []
    chosen = _available(spec, asked, device, log)
    purse = _Budget(budget, spec if budget is not None and device == "cuda" else None)
    job = _Job(spec, directions, device, Timing(repetitions, seconds, limit, clock), log)
    tasks = [
        task
        for task in _tasks(spec, case_names, dtypes, device, any(map(purse.compiler_seconds, chosen)))
        if any_dtype or task.dtype in task.case.cpu_dtypes
    ]
    return _run_tasks(job, tasks, chosen, bool(asked), purse, on_records)


@dataclass(frozen=True)
class _Job:
    """The choices that hold for every case and dtype of a run."""

    op: Op
    directions: Sequence[str]
    device: str
    timing: Timing
    log: Log


@dataclass(frozen=True)
class _Task:
    case: Case
    dtype: str
    with_compilers: bool  # once more, with the providers whose compilers are slow

    def __str__(self) -> str:
        return f"{self.case.name} {self.dtype}"


class _Budget:
    """The seconds of a run: spent, left, needed."""

    def __init__(self, seconds: float | None, compiling: Op | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self.durations: list[float] = []  # of what was measured
        self._compiling = compiling  # None where compilers are not budgeted
        self._started = time.perf_counter()

    def compiler_seconds(self, provider: str) -> float:
        return 0.0 if self._compiling is None else self._compiling.providers[provider].compiler_seconds

    def left(self, *compiled: str) -> float:
        """Return the seconds left after the first calls of some providers."""
        spent = time.perf_counter() - self._started
        return self.seconds - spent - sum(map(self.compiler_seconds, compiled))

    def fits(self, compilers: Sequence[str]) -> bool:
        """Return whether a task like those before fits, with the fastest of ``compilers``; the first always does."""
        needed = min(map(self.compiler_seconds, compilers), default=0.0)
        return not self.durations or self.left() >= statistics.median(self.durations) + needed


def _run_tasks(
    job: _Job, tasks: Iterable[_Task], chosen: Sequence[str], asked: bool, budget: _Budget, on_records: Keep
) -> list[Record]:
    records: dict[str, list[Record]] = {}
    failures: dict[str, None] = {}
    left_out: list[str] = []
    for task in tasks:
        now = time.perf_counter()
        here = list(chosen) if asked else _not_left_out(job, task, chosen)
        compilers = [name for name in here if budget.compiler_seconds(name)]
        if task.with_compilers and not compilers:
            continue
        if not budget.fits(compilers if task.with_compilers else ()):
            left_out.append(f"{task} ({', '.join(compilers)})" if task.with_compilers else str(task))
            continue
        if budget.durations:  # what does not fit is left out from now on
            job = replace(job, timing=replace(job.timing, limit=min(job.timing.limit, budget.left() / 2)))
        here = here if task.with_compilers else [name for name in here if name not in compilers]
        group = records.setdefault(str(task), [])

        def keep(found: list[Record], group: list[Record] = group) -> None:
            if len(found) >= len(group):  # the same providers and more
                group[:] = found
                on_records(list(found))

        failed = _run_group(job, task.case, task.dtype, here, budget.left, keep)
        if not task.with_compilers:
            budget.durations.append(time.perf_counter() - now)
        failures |= dict.fromkeys(f"{name} on {task}: {why}" for name, why in failed.items())
    if left_out:
        job.log(f"left out to stay within {budget.seconds:g} s: {', '.join(left_out)}")
    fatal = [line for line in failures if asked or is_ours(line) or line.startswith(_EVERYTHING)]
    if fatal:
        raise BenchmarkError("; ".join(fatal))
    return [record for group in records.values() for record in group]


def _not_left_out(job: _Job, task: _Task, providers: Iterable[str]) -> list[str]:
    reasons = {name: job.op.providers[name].left_out(task.case, task.dtype, job.device) for name in providers}
    for name, reason in reasons.items():
        if reason is not None and not task.with_compilers:
            job.log(f"without {name} on {task}: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def _tasks(op: Op, cases: Iterable[str], dtypes: Sequence[str], device: str, compilers: bool) -> list[_Task]:
    """Every case and dtype in the order of their importance."""
    found = [
        _Task(op.cases[case], dtype, with_compilers)
        for case in cases
        for with_compilers in ((False, True) if compilers else (False,))
        for dtype in dtypes
    ]
    return sorted(found, key=lambda task: (task.dtype == "float16", device not in task.case.headline))


def _available(op: Op, asked: Sequence[str] | None, device: str, log: Log) -> list[str]:
    chosen = []
    for name in asked or op.providers:
        reason = unavailable_reason(op.name, name, device)
        if asked and reason is not None:
            raise ValueError(f"provider {name} cannot run on {device}: {reason}")
        if not asked and (reason := reason or op.providers[name].unasked(device)) is not None:
            log(f"without {name}: {reason}")
            continue
        chosen.append(name)
    return chosen


def _of_this_op(what: str, names: Sequence[str], op: Op, log: Log) -> list[str]:
    """Return names of cases or providers without those that only other ops have; ValueError if no op has one."""
    known, *others = ([*getattr(one, f"{what}s")] for one in (op, *OPS.values()))
    passed_over = [name for name in names if name not in known and any(name in other for other in others)]
    if passed_over:
        log(f"{op.name} has no {what} {', '.join(passed_over)}: another op has")
    return _choices(what, [name for name in names if name not in passed_over], known)


def _choices(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; choose from: {', '.join(known)}")
    return names


def _run_group(
    job: _Job, case: Case, dtype_name: str, providers: Sequence[str], left_after: Callable[[str], float], keep: Keep
) -> dict[str, str]:
    """Measure one case and dtype; return provider -> message of those that failed.

    ``left_after``: seconds left for a provider after its first calls. ``keep`` receives all records so far of this case
    and dtype whenever there are more.
    """
    op, device = job.op, job.device
    dtype = getattr(torch, dtype_name)
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    inputs = case.inputs(dtype, device)
    steps, failed, late = _agreeing(job, inputs, providers, left_after)
    for name, why in (failed | late).items():
        job.log(f"without {name} on {case.name} {dtype_name}: {why}")
    if not steps:
        return failed
    copy = _copy(inputs) if op.floor is COPY else None
    facts: dict[str, Any] = {
        "op": op.name,
        "case": case.name,
        "sizes": case.sizes,
        "class_counts": case.counts_name,
        "dtype": dtype_name,
        "device": device_name(device),
        "device_slug": device_slug(device),
        "versions": versions(),
        "git": git_revision(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "clock": job.timing.clock,
    }
    records: list[Record] = []
    for make_parts, names in ((inference_parts, ("fwd",)), (training_parts, ("bwd", "fwd_bwd"))):
        wanted = [direction for direction in job.directions if direction in names]
        if not wanted:
            continue
        parts = {name: make_parts(step) for name, step in steps.items()}
        peaks = {name: peak_bytes(parts[name], inputs, device) for name in parts if op.providers[name].is_loss}
        times = measure({**parts, **({"copy": [copy]} if copy else {})}, inputs, device, job.timing)
        copy_gbps = None
        if copy is not None:
            copied_bytes = 2 * inputs.in_memory.numel() * dtype.itemsize
            copy_gbps = copied_bytes / statistics.median(map(sum, times.pop("copy"))) / 1e6
        for direction in wanted:
            cost = op.cost(case, dtype, direction)
            found = _records(op, {**facts, "direction": direction}, cost, copy_gbps, times, peaks)
            for record in found:
                job.log(_line(op, record))
            records += found
        keep(records)
    inputs.drop_gradients()
    return failed


def _capture_all(job: _Job, step: Step, inputs: Inputs) -> None:
    """Raise what capturing the step as a CUDA graph raises, in every mode that will be timed."""
    if "fwd" in job.directions:
        capture(inference_parts(step), inputs)
    if set(job.directions) - {"fwd"}:
        capture(training_parts(step), inputs)


def _copy(inputs: Inputs) -> Callable[[], object]:
    """A copy of the logits into an existing buffer."""
    source = inputs.in_memory.detach()
    return partial(torch.empty_like(source).copy_, source)


def _records(
    op: Op,
    facts: Mapping[str, Any],
    cost: Cost,
    copy_gbps: float | None,
    times: Mapping[str, Sequence[Times]],
    peaks: Mapping[str, tuple[int | None, list[int]]],
) -> list[Record]:
    """Make the records of one direction."""
    backward = facts["direction"] == "bwd"  # the second part of the repetitions of fwd_bwd
    samples = {name: [each[1] if backward else sum(each) for each in found] for name, found in times.items()}
    floor_ms = None
    if copy_gbps is not None:
        floor_ms = cost.bytes_moved / copy_gbps / 1e6
    elif op.floor.name in samples:
        floor_ms = statistics.median(samples[op.floor.name])
    records = []
    for name, milliseconds in samples.items():
        total_peak, part_peaks = peaks.get(name, (None, []))
        median = statistics.median(milliseconds)
        numbers = {
            "ms_median": median,
            "ms_p20": quantile(milliseconds, 0.2),
            "ms_p80": quantile(milliseconds, 0.8),
            "gbps": cost.bytes_moved / median / 1e6,
            "copy_gbps": copy_gbps,
            "fraction_of_floor": None if floor_ms is None else floor_ms / median,
            "static_floor_ms": cost.static_floor_ms(facts["device"]),
        }
        rounded: dict[str, Any] = {
            key: value if value is None else float(f"{value:.5g}") for key, value in numbers.items()
        }
        record = Record(
            provider=name,
            backend=op.providers[name].backend,
            repetitions=len(milliseconds),
            peak_bytes=part_peaks[1] if backward and part_peaks else total_peak,
            bytes_moved=cost.bytes_moved,
            flops=cost.flops,
            **rounded,
            **facts,
        )
        records.append(record)
    return records


def _line(op: Op, record: Record) -> str:
    shown = op.floor.show(record.fraction_of_floor)
    rate = f"{record.gbps:8.1f} GB/s"
    if op.floor is not COPY:
        rate = f"{record.flops / record.ms_median / 1e6:8.1f} GFLOP/s"
    where = f"{record.case:18} {record.dtype:9} {record.direction:8} {record.provider:23}"
    if record.clock != "device":
        where = f"{record.clock:6} {where}"
    return f"{where} {record.ms_median:9.4f} ms  {rate}  {shown:>6} {op.floor.heading.removeprefix('x ')}" + (
        "" if record.static_floor_ms is None else f"  static floor {record.static_floor_ms:.3f} ms"
    )


def _agreeing(
    job: _Job, inputs: Inputs, providers: Sequence[str], left_after: Callable[[str], float]
) -> tuple[dict[str, Step], dict[str, str], dict[str, str]]:
    """Return the steps that run and agree with float64, each called once in every mode that will be timed.

    The op's floor, if it is a provider, is among them, asked for or not. The second dictionary has the messages of the
    providers that failed, the third of those that no time was left for: the floor and our backends come first. Where
    float64 or eager cannot be computed, nothing can be checked, and all of them fail.
    """
    op = job.op
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    late: dict[str, str] = {}
    try:
        agreement = op.make_agreement(inputs)
    except Exception as error:
        return {}, {_EVERYTHING: first_line(error)}, {}
    with_floor = dict.fromkeys([*({op.floor.name} & op.providers.keys()), *providers])
    for name in sorted(with_floor, key=lambda name: (name != op.floor.name, not is_ours(name))):
        if steps and left_after(name) <= 0:
            late[name] = "there is no time left for it"
            continue
        try:
            step = op.make_step(name, inputs)
            if op.providers[name].is_loss:
                agreement.check(name, step)
            elif set(job.directions) - {"fwd"}:
                step().backward()
            if job.timing.clock == "graph":
                _capture_all(job, step, inputs)
            if "fwd" in job.directions:
                with torch.no_grad():
                    step()
            steps[name] = step
        except Exception as error:  # out of memory, a size that a peer does not take, a compiler that is missing
            failed[name] = first_line(error)
        inputs.drop_gradients()
    return {name: steps[name] for name in with_floor if name in steps}, failed, late
