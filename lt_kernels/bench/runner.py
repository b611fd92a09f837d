"""Measure providers in turns, so that drifts of the machine touch all of them alike, and make records."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import info
from . import margin_cross_entropy
from .cases import Case
from .records import Record, device_name, device_slug, git_revision, versions

#: op name -> the module that knows its cases, providers, inputs and costs.
OPS: dict[str, ModuleType] = {margin_cross_entropy.OP: margin_cross_entropy}
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")

_WARMUP = 3
_BURST = 5
_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
Log = Callable[[str], None]


def unavailable_reason(op: str, provider: str, device: str) -> str | None:
    """None where ``provider`` can be measured on ``device``, else the reason why not."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    if not provider.startswith("lt["):
        return None
    backend = provider.removeprefix("lt[").removesuffix("]")
    reasons: dict[str, str | None] = info()["backends"][op][device]
    return reasons[backend]


def run(
    op: str,
    *,
    cases: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    directions: Sequence[str] = ("fwd", "fwd_bwd"),
    device: str = "cpu",
    repetitions: int = 20,
    seconds: float = 2.0,
    check: bool = True,
    log: Log = lambda line: None,
    on_records: Callable[[list[Record]], None] = lambda records: None,
) -> list[Record]:
    """Measure an op and return the records; agreement with float64 is asserted before anything is timed.

    Args:
        op: a key of ``OPS``.
        cases: names; default those meant for the device.
        providers: names; one asked for by name must be available. Default: all that are, but for ``lt[reference]``,
            which defines the mathematics and is not meant to be fast.
        dtypes, directions: names from ``DTYPES`` and ``DIRECTIONS``.
        device: ``"cpu"`` or ``"cuda"``.
        repetitions: at least this many of each provider ...
        seconds: ... and more until a case, dtype and direction has taken this long.
        check: assert agreement first. Switch off only to try a provider.
        log: receives one line per step.
        on_records: receives the records of each case and dtype as soon as they exist.

    Raises:
        ValueError: an unknown name, or a provider asked for that cannot run; the message lists the choices.
        AssertionError: a provider's result is not within the error budget.
    """
    module = OPS[_choices("op", [op], OPS)[0]]
    case_names = [name for name, case in module.CASES.items() if device in case.devices]
    case_names = _choices("case", cases, module.CASES) if cases else case_names
    everything = [name for name in module.PROVIDERS if name != "lt[reference]"]
    chosen = _choices("provider", providers, module.PROVIDERS) if providers else everything
    _choices("dtype", dtypes, DTYPES)
    _choices("direction", directions, DIRECTIONS)
    _choices("device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: no CUDA device is available")
    if repetitions < 1:
        raise ValueError(f"repetitions: got {repetitions}, expected at least 1")
    for provider in list(chosen):
        reason = unavailable_reason(op, provider, device)
        if reason is not None and providers:
            raise ValueError(f"provider {provider} cannot run on {device}: {reason}")
        if reason is not None:
            log(f"without {provider}: {reason}")
            chosen.remove(provider)

    records: list[Record] = []
    for case_name in case_names:
        for dtype_name in dtypes:
            group = _run_group(
                module,
                module.CASES[case_name],
                dtype_name,
                chosen,
                directions,
                device,
                repetitions,
                seconds,
                check,
                log,
            )
            on_records(group)
            records += group
    return records


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
    repetitions: int,
    seconds: float,
    check: bool,
    log: Log,
) -> list[Record]:
    dtype = getattr(torch, dtype_name)
    torch.compiler.reset()
    inputs = module.make_inputs(case, dtype, device)
    if check:
        for provider in providers:
            module.check_agreement(provider, inputs)
    losses = {provider: module.make_step(provider, inputs) for provider in providers}
    destination = torch.empty_like(inputs.logits, requires_grad=False)
    source = inputs.logits.detach()
    copied_bytes = 2 * source.numel() * source.element_size()
    facts: dict[str, Any] = {
        "device": device_name(device),
        "device_slug": device_slug(device),
        "versions": versions(),
        "git": git_revision(),
    }

    records = []
    for direction in directions:
        steps = {name: _step(loss, inputs.logits, direction) for name, loss in losses.items()}
        steps["copy"] = (lambda: None, lambda _: destination.copy_(source))
        times = measure(steps, device, repetitions, seconds)
        copy_gbps = copied_bytes / statistics.median(times.pop("copy")) / 1e6
        bytes_moved, flops = module.cost(case, dtype, direction)
        for provider, samples in times.items():
            median = statistics.median(samples)
            gbps = bytes_moved / median / 1e6
            records.append(
                Record(
                    op=module.OP,
                    provider=provider,
                    backend=provider[3:-1] if provider.startswith("lt[") else None,
                    case=case.name,
                    sizes={"N": case.rows, "C": case.classes},
                    dtype=dtype_name,
                    direction=direction,
                    ms_median=_significant(median),
                    ms_p20=_significant(_quantile(samples, 0.2)),
                    ms_p80=_significant(_quantile(samples, 0.8)),
                    repetitions=len(samples),
                    peak_bytes=peak_bytes(*steps[provider], device),
                    bytes_moved=bytes_moved,
                    flops=flops,
                    gbps=_significant(gbps),
                    copy_gbps=_significant(copy_gbps),
                    fraction_of_floor=_significant(gbps / copy_gbps),
                    **facts,
                )
            )
            log(
                f"{case.name:18} {dtype_name:9} {direction:8} {provider:14} {median:9.3f} ms"
                f"  {gbps:8.1f} GB/s  {gbps / copy_gbps:6.1%} of copy"
            )
    return records


Setup = Callable[[], Tensor | None]
Step = Callable[[Tensor | None], object]


def _step(loss: Callable[[], Tensor], logits: Tensor, direction: str) -> tuple[Setup, Step]:
    """(untimed preparation, which drops the previous gradient; timed step)."""

    def drop_gradient() -> None:
        logits.grad = None

    def prepare_backward() -> Tensor:
        drop_gradient()
        return loss()

    def forward(_: Tensor | None) -> object:
        with torch.no_grad():
            return loss()

    def backward(value: Tensor | None) -> None:
        assert value is not None
        value.backward()

    if direction == "bwd":
        return prepare_backward, backward
    return drop_gradient, forward if direction == "fwd" else lambda _: backward(loss())


def measure(
    steps: dict[str, tuple[Setup, Step]], device: str, repetitions: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every repetition of each step, taken in turns whose order rotates.

    On a CPU the wall clock, in bursts: a turn repeats its step ``_BURST`` times after one untimed repetition, so that a
    step finds the caches as its own repetition left them and not as another provider did. On a GPU the device's time
    between two events, one repetition a turn: the L2 cache is overwritten before each, which also keeps the device busy
    while the host runs ahead, so that launch latency is not counted.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if device == "cuda" else None

    def once(setup: Setup, step: Step) -> float:
        value = setup()
        if flush is None:
            start = time.perf_counter()
            step(value)
            return (time.perf_counter() - start) * 1e3
        for _ in range(8):
            flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        step(value)
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)

    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_WARMUP):
        for name in names:
            once(*steps[name])
    burst = 1 if flush is not None else min(_BURST, repetitions)
    started = time.perf_counter()
    turn = 0
    while turn * burst < repetitions or time.perf_counter() - started < seconds:
        for position in range(len(names)):
            name = names[(position + turn) % len(names)]
            if flush is None:
                once(*steps[name])
            times[name] += [once(*steps[name]) for _ in range(burst)]
        turn += 1
    return times


def peak_bytes(setup: Setup, step: Step, device: str) -> int | None:
    """Most memory allocated at once during one step, beyond what was allocated before it; None where unknown."""
    value = setup()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(value)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop otherwise
    with suppress(Exception):  # the profiler may be missing from a build of torch; the times above stand without it
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(value)
        results = profile.profiler.kineto_results
        changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
        held = peak = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            held += change
            peak = max(peak, held)
        return peak
    return None


def _quantile(samples: list[float], q: float) -> float:
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _significant(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
