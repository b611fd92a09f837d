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
from torch import Tensor

from . import margin_cross_entropy
from .cases import Case
from .providers import first_line
from .records import Record, device_name, device_slug, git_revision, versions
from .roofline import static_floor_ms

#: op name -> the module that knows its cases, providers, inputs and costs.
OPS: dict[str, ModuleType] = {margin_cross_entropy.OP: margin_cross_entropy}
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")

_WARMUP = 3
_BURST = 5
_SLOW_MS = 250.0  # a step that takes longer is warmed up once and repeated one by one
_FEWEST = 3  # repetitions, however slow
_EVERYTHING = "everything"  # stands for all providers in messages
_PART = "lt_kernels.bench: part"
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
Log = Callable[[str], None]


class BenchmarkError(RuntimeError):
    """One of our backends, or a provider asked for by name, failed or disagreed with float64."""


@dataclass(frozen=True)
class Timing:
    """How long a case and dtype is measured: once without a graph (fwd), once with one (bwd and fwd_bwd)."""

    repetitions: int = 20  # at least, of each provider ...
    seconds: float = 1.0  # ... and until this has passed ...
    limit: float = 6.0  # ... unless it would take longer than this; never fewer than 3 repetitions


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
    dtypes: Sequence[str] = DTYPES,
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
    its message on ``log``.

    Args:
        op: a key of ``OPS``.
        cases: names; default those meant for the device.
        providers: names; one asked for by name must be available. Default: all that are, without those that say
            why they are not measured unasked. Reasons go to ``log``.
        dtypes, directions: names from ``DTYPES`` and ``DIRECTIONS``.
        device: ``"cpu"`` or ``"cuda"``.
        repetitions, seconds, limit: as in ``Timing``.
        budget: seconds for everything; what does not fit is left out and named on ``log``. At least one case and dtype
            is measured.
        check: assert agreement first. Switch off only to try a provider.
        log: receives one line per step.
        on_records: receives the records of each case and dtype as soon as they exist.

    Raises:
        ValueError: an unknown name, or a provider asked for that cannot run; the message lists the choices.
        BenchmarkError: after everything has been measured, if one of our backends or a provider asked for by name
            failed somewhere.
    """
    module = OPS[_choices("op", [op], OPS)[0]]
    _choices("dtype", dtypes, DTYPES)
    _choices("direction", directions, DIRECTIONS)
    check_device(device)
    if repetitions < 1:
        raise ValueError(f"repetitions: got {repetitions}, expected at least 1")
    for name, value in (("seconds", seconds), ("limit", limit), ("budget", budget)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: got {value}, expected seconds, 0 or more")
    default_cases = [name for name, case in module.CASES.items() if device in case.devices]
    case_names = _choices("case", cases, module.CASES) if cases else default_cases
    chosen = _providers(op, providers, device, log)

    timing = Timing(repetitions, seconds, limit)
    groups = sorted(
        ((module.CASES[case], dtype) for case in case_names for dtype in dtypes),
        key=lambda group: (group[1] == "float16", device not in group[0].headline),
    )
    records: list[Record] = []
    failures: list[str] = []
    durations: list[float] = []
    started = time.perf_counter()
    for index, (case, dtype) in enumerate(groups):
        now = time.perf_counter()
        if budget is not None and durations:
            left = budget - (now - started)
            if left < statistics.median(durations):
                names = ", ".join(f"{case.name} {dtype}" for case, dtype in groups[index:])
                log(f"left out to stay within {budget:g} s: {names}")
                break
            timing = replace(timing, limit=min(limit, left / 2))
        group, failed = _run_group(module, case, dtype, chosen, directions, device, timing, check, log)
        durations.append(time.perf_counter() - now)
        on_records(group)
        records += group
        failures += [f"{name} on {case.name} {dtype}: {why}" for name, why in failed.items()]
    fatal = [line for line in failures if providers or line.startswith(("lt[", _EVERYTHING))]
    if fatal:
        raise BenchmarkError("; ".join(fatal))
    return records


def _providers(op: str, asked: Sequence[str] | None, device: str, log: Log) -> list[str]:
    known = OPS[op].PROVIDERS
    if asked:
        for name in _choices("provider", asked, known):
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
) -> tuple[list[Record], dict[str, str]]:
    """The records of one case and dtype, and provider -> message of those that failed."""
    dtype = getattr(torch, dtype_name)
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    inputs = module.make_inputs(case, dtype, device)
    losses, failed = _agreeing(module, inputs, providers, directions, check)
    for name, why in failed.items():
        log(f"without {name} on {case.name} {dtype_name}: {why}")
    if not losses:
        return [], failed
    source = inputs.logits.detach()
    destination = torch.empty_like(source)
    copied_bytes = 2 * source.numel() * source.element_size()
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
        steps = {name: (inference_parts if inference else training_parts)(loss) for name, loss in losses.items()}
        peaks = {name: peak_bytes(parts, inputs.logits, device) for name, parts in steps.items()}
        times = measure({**steps, "copy": [lambda: destination.copy_(source)]}, inputs.logits, device, timing)
        copy_gbps = copied_bytes / statistics.median(map(sum, times.pop("copy"))) / 1e6
        for direction, (name, samples) in itertools.product(wanted, times.items()):
            # the backward pass alone is the second part of the same repetitions
            milliseconds = [parts[1] if direction == "bwd" else sum(parts) for parts in samples]
            total_peak, part_peaks = peaks[name]
            median = statistics.median(milliseconds)
            bytes_moved, flops, exponentials = module.cost(case, dtype, direction)
            floor = static_floor_ms(facts["device"], bytes_moved, flops, exponentials)
            gbps = bytes_moved / median / 1e6
            records.append(
                Record(
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
                    bytes_moved=bytes_moved,
                    flops=flops,
                    gbps=_significant(gbps),
                    copy_gbps=_significant(copy_gbps),
                    fraction_of_floor=_significant(gbps / copy_gbps),
                    static_floor_ms=None if floor is None else _significant(floor),
                    **facts,
                )
            )
            log(
                f"{case.name:18} {dtype_name:9} {direction:8} {name:21} {median:9.3f} ms"
                f"  {gbps:8.1f} GB/s  {gbps / copy_gbps:6.1%} of copy"
                + ("" if floor is None else f"  static floor {floor:.3f} ms")
            )
    inputs.logits.grad = None
    return records, failed


def _agreeing(
    module: ModuleType, inputs: Any, providers: Sequence[str], directions: Sequence[str], check: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Steps of the providers that run and agree with float64, each called once in every mode that will be timed.

    The second dictionary has the messages of the others. Where float64 or eager cannot be computed there is nothing to
    hold them to, and all of them fail.
    """
    losses: dict[str, Callable[[], Tensor]] = {}
    failed: dict[str, str] = {}
    try:
        agreement = module.Agreement(inputs) if check else None
    except Exception as error:
        return {}, {_EVERYTHING: first_line(error)}
    for name in providers:
        try:
            loss = module.make_step(name, inputs)
            if agreement is not None:
                agreement.check(name, loss)
            elif set(directions) - {"fwd"}:
                loss().backward()
            if "fwd" in directions:
                with torch.no_grad():
                    loss()
            losses[name] = loss
        except Exception as error:  # out of memory, a size that a peer does not take, a compiler that is missing
            failed[name] = first_line(error)
        inputs.logits.grad = None
    return losses, failed


#: A step in the parts that are timed one after the other.
Parts = Sequence[Callable[[], object]]


def inference_parts(loss: Callable[[], Tensor]) -> Parts:
    """[forward pass without a graph]"""

    def forward() -> None:
        with torch.no_grad():
            loss()

    return [forward]


def training_parts(loss: Callable[[], Tensor]) -> Parts:
    """[forward pass, backward pass]"""
    held: list[Tensor] = []
    return [lambda: held.append(loss()), lambda: held.pop().backward()]


def measure(
    steps: Mapping[str, Parts], logits: Tensor, device: str, timing: Timing
) -> dict[str, list[tuple[float, ...]]]:
    """Milliseconds of the parts of every repetition of each step, taken in turns whose order rotates.

    The gradient of ``logits`` is dropped before each repetition. On a CPU the wall clock, in bursts: a turn repeats its
    step ``_BURST`` times after one untimed repetition, so that a step finds the caches as its own repetition left them
    and not as another provider did. On a GPU the device's time between events, one repetition a turn: the L2 cache is
    overwritten before each, which also keeps the device busy while the host runs ahead, so that launch latency is not
    counted. A step beyond ``_SLOW_MS`` is timed once a turn, and its first repetition counts.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if device == "cuda" else None

    def once(parts: Parts) -> tuple[float, ...]:
        logits.grad = None
        if flush is None:
            clock = [time.perf_counter()]
            for part in parts:
                part()
                clock.append(time.perf_counter())
            return tuple((end - start) * 1e3 for start, end in itertools.pairwise(clock))
        for _ in range(8):
            flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        torch.cuda.synchronize()
        return tuple(start.elapsed_time(end) for start, end in itertools.pairwise(events))

    names = list(steps)
    started = time.perf_counter()
    times = {name: [once(steps[name])] for name in names}
    fast = [name for name in names if sum(times[name][0]) < _SLOW_MS]
    for name in fast:
        times[name].clear()
    for _ in range(_WARMUP - 1):
        for name in fast:
            once(steps[name])
    burst = 1 if flush is not None else min(_BURST, timing.repetitions)
    turn = 0
    while True:
        fewest, elapsed = min(map(len, times.values())), time.perf_counter() - started
        if fewest >= timing.repetitions and elapsed >= timing.seconds:
            return times
        if fewest >= _FEWEST and elapsed >= timing.limit:
            return times
        for position in range(len(names)):
            name = names[(position + turn) % len(names)]
            if name in fast and flush is None:
                once(steps[name])
            times[name] += [once(steps[name]) for _ in range(burst if name in fast else 1)]
        turn += 1


def peak_bytes(parts: Parts, logits: Tensor, device: str) -> tuple[int | None, list[int]]:
    """(most memory allocated at once during the step beyond what was there before it, the same of each part).

    (None, []) where it cannot be known.
    """
    logits.grad = None
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
