"""Measure providers in turns, so that drifts of the machine touch all of them alike, and make records."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from . import (
    contrastive,
    expert_cross_entropy,
    expert_divergence,
    expert_fusion,
    linear_margin_cross_entropy,
    margin_cross_entropy,
)
from .cases import Case, Inputs
from .providers import Step, first_line
from .records import COPY, Record, device_name, device_slug, git_revision, is_ours, versions
from .roofline import static_floor_ms

#: op name -> the module that knows its cases, dtypes, providers, inputs, agreement, costs and targets.
OPS: dict[str, ModuleType] = {
    module.OP: module
    for module in (
        margin_cross_entropy,
        linear_margin_cross_entropy,
        expert_cross_entropy,
        expert_fusion,
        expert_divergence,
        contrastive,
    )
}
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")

_WARMUP = 3
_BURST = 5
_SLOW_MS = 250.0  # a step that takes longer is warmed up once and repeated one by one
_FEWEST = 3  # repetitions, however slow ...
_ONCE_MS = 5000.0  # ... unless it takes longer than this: it is timed once
_EVERYTHING = "everything"  # stands for all providers in messages
_PART = "lt_kernels.bench: part"
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
_CYCLES_A_MS = 2e6  # of a GPU, at least about
_MOST_HOST_MS = 20.0  # what a first repetition takes beyond is compilation
Log = Callable[[str], None]


class BenchmarkError(RuntimeError):
    """One of our backends, or a provider asked for by name, failed or disagreed with float64."""


@dataclass(frozen=True)
class Timing:
    """How long a case and dtype is measured: once without a graph (fwd), once with one (bwd and fwd_bwd)."""

    repetitions: int = 20  # at least, of each provider ...
    seconds: float = 1.0  # ... and until this has passed ...
    limit: float = 6.0  # ... unless it would take longer than this; never fewer than 3, or one of over 5 s


def unavailable_reason(op: str, provider: str, device: str) -> str | None:
    """None where ``provider`` can be measured on ``device``, else the reason why not."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    reason: str | None = OPS[op].PROVIDERS[provider].unavailable(device)
    return reason


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
    budget: float | None = None,
    check: bool = True,
    log: Log = lambda line: None,
    on_records: Callable[[list[Record]], None] = lambda records: None,
) -> list[Record]:
    """Measure an op and return the records; agreement with float64 is asserted before anything is timed.

    Headline cases come first, float16 last. A provider that fails or disagrees is left out of that case and dtype, with
    its message on ``log``. On a GPU with a budget, a case and dtype is measured without what a compiler takes long for,
    and once more with it (all in turns again) where that fits.

    Args:
        op: a key of ``OPS``.
        cases: names; default those meant for the device. Names of other ops' cases are passed over, which is said.
        providers: names, likewise; one asked for by name must be available. Default: all that are, without those that
            say why they are not measured, or not on a case, unasked. Reasons go to ``log``. The op's floor is always
            measured.
        dtypes, directions: names from ``DTYPES`` and ``DIRECTIONS``; default those meant for the device (on a CPU, and
            for the case), and all.
            Directions that the op does not have are passed over.
        device: ``"cpu"`` or ``"cuda"``.
        repetitions, seconds, limit: as in ``Timing``.
        budget: seconds for everything; what does not fit is left out and named on ``log``. At least one provider of
            one case and dtype is measured.
        check: assert agreement first. Switch off only to try a provider.
        log: receives one line per step.
        on_records: receives the records of each case and dtype as soon as they exist; the same ones again, and more
            of that case and dtype, as more exist.

    Raises:
        ValueError: an unknown name, or a provider asked for that cannot run; the message lists the choices.
        BenchmarkError: after everything has been measured, if one of our backends or a provider asked for by name
            failed somewhere.
    """
    module = OPS[_choices("op", [op], OPS)[0]]
    any_dtype = bool(dtypes) or device != "cpu"
    dtypes = _choices("dtype", dtypes or module.DTYPES.get(device, DTYPES), DTYPES)
    directions = [name for name in _choices("direction", directions, DIRECTIONS) if name in module.DIRECTIONS]
    check_device(device)
    if repetitions < 1:
        raise ValueError(f"repetitions: got {repetitions}, expected at least 1")
    for name, value in (("seconds", seconds), ("limit", limit), ("budget", budget)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: got {value}, expected seconds, 0 or more")
    default_cases = [name for name, case in module.CASES.items() if device in case.devices]
    case_names = _of_this_op("case", cases, op, "CASES", log) if cases else default_cases
    asked = _of_this_op("provider", providers, op, "PROVIDERS", log) if providers else None
    if not case_names or asked == [] or not directions:
        return []
    chosen = _providers(op, asked, device, log)

    timing = Timing(repetitions, seconds, limit)
    records: dict[tuple[str, str], list[Record]] = {}
    failures: dict[str, None] = {}
    left_out: list[str] = []
    durations: list[float] = []
    started = time.perf_counter()

    def left() -> float:
        return math.inf if budget is None else budget - (time.perf_counter() - started)

    def slow(name: str) -> float:
        """Seconds of its compiler where the budget knows them."""
        return module.PROVIDERS[name].compiler_seconds if budget is not None and device == "cuda" else 0.0

    for case, dtype, whole in _tasks(module, case_names, dtypes, device, any(map(slow, chosen))):
        if not any_dtype and dtype not in case.cpu_dtypes:
            continue
        now = time.perf_counter()
        here = chosen
        if not asked:
            reasons = {name: module.PROVIDERS[name].left_out(case, dtype, device) for name in chosen}
            here = [name for name in chosen if reasons[name] is None]
            for name, reason in reasons.items():
                if reason is not None and not whole:
                    log(f"without {name} on {case.name} {dtype}: {reason}")
        compilers = [name for name in here if slow(name)]
        if whole and not compilers:
            continue
        needed = statistics.median(durations or [0.0]) + (min(map(slow, compilers)) if whole else 0.0)
        if durations and left() < needed:
            left_out.append(f"{case.name} {dtype}" + (f" ({', '.join(compilers)})" if whole else ""))
            continue
        if durations and budget is not None:
            timing = replace(timing, limit=min(limit, left() / 2))
        here = here if whole else [name for name in here if name not in compilers]
        keep = _Kept(records.setdefault((case.name, dtype), []), on_records)
        failed = _run_group(
            module, case, dtype, here, directions, device, timing, check, log, lambda name: left() - slow(name), keep
        )
        if not whole:
            durations.append(time.perf_counter() - now)
        failures |= dict.fromkeys(f"{name} on {case.name} {dtype}: {why}" for name, why in failed.items())
    if left_out:
        log(f"left out to stay within {budget:g} s: {', '.join(left_out)}")
    fatal = [line for line in failures if asked or is_ours(line) or line.startswith(_EVERYTHING)]
    if fatal:
        raise BenchmarkError("; ".join(fatal))
    return [record for group in records.values() for record in group]


def _tasks(
    module: ModuleType, cases: Sequence[str], dtypes: Sequence[str], device: str, compilers: bool
) -> list[tuple[Case, str, bool]]:
    """(case, dtype, whether with what a compiler takes long for) in the order of their importance."""
    found = [
        (module.CASES[case], dtype, whole)
        for case in cases
        for whole in ((False, True) if compilers else (False,))
        for dtype in dtypes
    ]
    return sorted(found, key=lambda task: (task[1] == "float16", device not in task[0].headline))


class _Kept:
    """The records of one case and dtype, replaced by those of the same providers and more."""

    def __init__(self, records: list[Record], tell: Callable[[list[Record]], None]) -> None:
        self._records, self._tell = records, tell

    def __call__(self, records: list[Record]) -> None:
        if len(records) >= len(self._records):
            self._records[:] = records
            self._tell(list(records))


def _providers(op: str, asked: Sequence[str] | None, device: str, log: Log) -> list[str]:
    known = OPS[op].PROVIDERS
    if asked:
        for name in asked:
            reason = unavailable_reason(op, name, device)
            if reason is not None:
                raise ValueError(f"provider {name} cannot run on {device}: {reason}")
        return list(asked)
    chosen = []
    for name, provider in known.items():
        reason = unavailable_reason(op, name, device) or provider.unasked(device)
        if reason is None:
            chosen.append(name)
        else:
            log(f"without {name}: {reason}")
    return chosen


def _of_this_op(what: str, names: Sequence[str], op: str, table: str, log: Log) -> list[str]:
    """``names`` without those that only other ops have. ValueError for one that none has."""
    known = getattr(OPS[op], table)
    others = {name for module in OPS.values() for name in getattr(module, table)} - set(known)
    passed_over = [name for name in names if name in others]
    if passed_over:
        log(f"{op} has no {what} {', '.join(passed_over)}: another op has")
    return _choices(what, [name for name in names if name not in others], known)


def _choices(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; choose from: {', '.join(known)}")
    return names


def _run_group(
    module: ModuleType,
    case: Case,
    dtype_name: str,
    providers: Sequence[str],
    directions: Sequence[str],
    device: str,
    timing: Timing,
    check: bool,
    log: Log,
    left: Callable[[str], float],
    keep: Callable[[list[Record]], None],
) -> dict[str, str]:
    """Measure one case and dtype; provider -> message of those that failed.

    ``left``: seconds for a provider when its first calls are over. ``keep`` receives all records so far of this case
    and dtype whenever there are more.
    """
    dtype = getattr(torch, dtype_name)
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    inputs = module.make_inputs(case, dtype, device)
    steps, failed, late = _agreeing(module, inputs, providers, directions, check, left)
    for name, why in (failed | late).items():
        log(f"without {name} on {case.name} {dtype_name}: {why}")
    if not steps:
        return failed
    copied_bytes, beside = 0, {}
    if module.FLOOR is COPY:
        copy, copied_bytes = module.make_copy(inputs)
        beside["copy"] = [copy]
    facts: dict[str, Any] = {
        "device": device_name(device),
        "device_slug": device_slug(device),
        "versions": versions(),
        "git": git_revision(),
    }

    records = []
    for inference in (True, False):
        wanted = [direction for direction in directions if (direction == "fwd") == inference]
        if not wanted:
            continue
        parts = {name: (inference_parts if inference else training_parts)(step) for name, step in steps.items()}
        peaks = {name: peak_bytes(parts[name], inputs, device) for name in parts if module.PROVIDERS[name].is_loss}
        times = measure({**parts, **beside}, inputs, device, timing)
        copy_gbps = copied_bytes / statistics.median(map(sum, times.pop("copy"))) / 1e6 if beside else None
        for direction in wanted:
            cost = module.cost(case, dtype, direction)
            # the backward pass alone is the second part of the same repetitions
            samples = {
                name: [each[1] if direction == "bwd" else sum(each) for each in found] for name, found in times.items()
            }
            floor_ms = None
            if copy_gbps is not None:
                floor_ms = cost.bytes_moved / copy_gbps / 1e6
            elif module.FLOOR.name in samples:
                floor_ms = statistics.median(samples[module.FLOOR.name])
            static = static_floor_ms(facts["device"], *cost)
            for name, milliseconds in samples.items():
                total_peak, part_peaks = peaks.get(name, (None, []))
                median = statistics.median(milliseconds)
                record = Record(
                    op=module.OP,
                    provider=name,
                    backend=module.PROVIDERS[name].backend,
                    case=case.name,
                    sizes=case.sizes,
                    dtype=dtype_name,
                    direction=direction,
                    ms_median=_significant(median),
                    ms_p20=_significant(_quantile(milliseconds, 0.2)),
                    ms_p80=_significant(_quantile(milliseconds, 0.8)),
                    repetitions=len(milliseconds),
                    peak_bytes=part_peaks[1] if direction == "bwd" and part_peaks else total_peak,
                    bytes_moved=cost.bytes_moved,
                    flops=cost.flops,
                    gbps=_significant(cost.bytes_moved / median / 1e6),
                    copy_gbps=None if copy_gbps is None else _significant(copy_gbps),
                    fraction_of_floor=None if floor_ms is None else _significant(floor_ms / median),
                    static_floor_ms=None if static is None else _significant(static),
                    **facts,
                )
                records.append(record)
                log(_line(module, record))
        keep(records)
    inputs.drop_gradients()
    return failed


def _line(module: ModuleType, record: Record) -> str:
    shown = module.FLOOR.show(record.fraction_of_floor)
    rate = f"{record.gbps:8.1f} GB/s"
    if module.FLOOR is not COPY:
        rate = f"{record.flops / record.ms_median / 1e6:8.1f} GFLOP/s"
    return (
        f"{record.case:18} {record.dtype:9} {record.direction:8} {record.provider:23} {record.ms_median:9.3f} ms"
        f"  {rate}  {shown:>6} {module.FLOOR.heading.removeprefix('x ')}"
        + ("" if record.static_floor_ms is None else f"  static floor {record.static_floor_ms:.3f} ms")
    )


def _agreeing(
    module: ModuleType,
    inputs: Inputs,
    providers: Sequence[str],
    directions: Sequence[str],
    check: bool,
    left: Callable[[str], float],
) -> tuple[dict[str, Step], dict[str, str], dict[str, str]]:
    """Steps of the providers that run and agree with float64, each called once in every mode that will be timed.

    The op's floor, where it is a provider, is among them, asked for or not. The second dictionary has the messages of
    those that failed, the third of those that there was no time for: the floor and our backends come first. Where
    float64 or eager cannot be computed there is nothing to hold them to, and all of them fail.
    """
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    late: dict[str, str] = {}
    try:
        agreement = module.Agreement(inputs) if check else None
    except Exception as error:
        return {}, {_EVERYTHING: first_line(error)}, {}
    with_floor = dict.fromkeys([*(name for name in [module.FLOOR.name] if name in module.PROVIDERS), *providers])
    for name in sorted(with_floor, key=lambda name: (name != module.FLOOR.name, not is_ours(name))):
        if steps and left(name) <= 0:
            late[name] = "there is no time left for it"
            continue
        try:
            step = module.make_step(name, inputs)
            if agreement is not None and module.PROVIDERS[name].is_loss:
                agreement.check(name, step)
            elif set(directions) - {"fwd"}:
                step().backward()
            if "fwd" in directions:
                with torch.no_grad():
                    step()
            steps[name] = step
        except Exception as error:  # out of memory, a size that a peer does not take, a compiler that is missing
            failed[name] = first_line(error)
        inputs.drop_gradients()
    return {name: steps[name] for name in with_floor if name in steps}, failed, late


#: A step in the parts that are timed one after the other.
Parts = Sequence[Callable[[], object]]


def inference_parts(step: Step) -> Parts:
    """[forward pass without a graph]"""

    def forward() -> None:
        with torch.no_grad():
            step()

    return [forward]


def training_parts(step: Step) -> Parts:
    """[forward pass, backward pass]"""
    held: list[Any] = []
    return [lambda: held.append(step()), lambda: held.pop().backward()]


def measure(
    steps: Mapping[str, Parts], inputs: Inputs, device: str, timing: Timing
) -> dict[str, list[tuple[float, ...]]]:
    """Milliseconds of the parts of every repetition of each step, taken in turns whose order rotates.

    Gradients of ``inputs`` are dropped before each repetition. On a CPU the wall clock, in bursts: a turn repeats its
    step ``_BURST`` times after one untimed repetition, so that a step finds the caches as its own repetition left them
    and not as another provider did. On a GPU the device's time between events, one repetition a turn: before each the
    device spins while the host runs ahead, so that what the host takes is not counted, and overwrites the L2 cache. A
    step beyond ``_SLOW_MS`` is timed once a turn, and its first repetition counts; one beyond ``_ONCE_MS``
    is not repeated.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if device == "cuda" else None
    host: dict[str, float] = {}  # milliseconds that the host takes for a repetition, the fewest so far

    def once(name: str) -> tuple[float, ...]:
        parts = steps[name]
        inputs.drop_gradients()
        if flush is None:
            clock = [time.perf_counter()]
            for part in parts:
                part()
                clock.append(time.perf_counter())
            return tuple((end - start) * 1e3 for start, end in itertools.pairwise(clock))
        torch.cuda._sleep(int((1.0 + 2.0 * host.get(name, 2.0)) * _CYCLES_A_MS))
        flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        began = time.perf_counter()
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        host[name] = min(host.get(name, _MOST_HOST_MS), (time.perf_counter() - began) * 1e3)
        torch.cuda.synchronize()
        return tuple(start.elapsed_time(end) for start, end in itertools.pairwise(events))

    names = list(steps)
    started = time.perf_counter()
    times = {name: [once(name)] for name in names}
    fast = [name for name in names if sum(times[name][0]) < _SLOW_MS]
    repeated = [name for name in names if sum(times[name][0]) < _ONCE_MS]
    for name in fast:
        times[name].clear()
    for _ in range(_WARMUP - 1):
        for name in fast:
            once(name)
    burst = 1 if flush is not None else min(_BURST, timing.repetitions)
    turn = 0
    while repeated:
        fewest, elapsed = min(len(times[name]) for name in repeated), time.perf_counter() - started
        if fewest >= timing.repetitions and elapsed >= timing.seconds:
            break
        if fewest >= _FEWEST and elapsed >= timing.limit:
            break
        for position in range(len(repeated)):
            name = repeated[(position + turn) % len(repeated)]
            if name in fast and flush is None:
                once(name)
            times[name] += [once(name) for _ in range(burst if name in fast else 1)]
        turn += 1
    return times


def peak_bytes(parts: Parts, inputs: Inputs, device: str) -> tuple[int | None, list[int]]:
    """(most memory allocated at once during the step beyond what was there before it, the same of each part).

    What counts is the memory of live tensors, gradients included: on a GPU what torch's caching allocator has handed
    out, on a CPU every allocation that torch's profiler sees, among them buffers that our CPU kernels keep for reuse,
    as long as a tensor lives in one. Scratch memory that libraries and kernels get for themselves is not seen. (None,
    []) where it cannot be known.
    """
    inputs.drop_gradients()
    if device == "cuda":
        torch.cuda.synchronize()
        starts, tops = [], []
        for part in parts:
            torch.cuda.reset_peak_memory_stats()
            starts.append(torch.cuda.memory_allocated())
            part()
            torch.cuda.synchronize()
            tops.append(torch.cuda.max_memory_allocated())
        return max(tops) - starts[0], [top - start for top, start in zip(tops, starts, strict=True)]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop otherwise
    with suppress(Exception):  # the profiler may be missing from a build of torch; the times stand without it
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for part in parts:
                with torch.profiler.record_function(_PART):
                    part()
        events = profile.profiler.kineto_results.events()
        held, peak = 0, 0
        starts, tops = [], []
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _PART:
                starts.append(held)
                tops.append(held)
            elif event.name() == "[memory]" and tops:
                held += event.nbytes()
                tops[-1] = max(tops[-1], held)
                peak = max(peak, held)
        if len(tops) == len(parts):
            return peak, [top - start for top, start in zip(tops, starts, strict=True)]
    return None, []


def _quantile(samples: list[float], q: float) -> float:
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _significant(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
