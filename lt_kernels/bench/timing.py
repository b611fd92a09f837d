"""Time and peak memory of steps: repetitions in turns, so that drifts of the machine touch all steps alike."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Inputs
from .providers import Step

_WARMUP = 3
_BURST = 5
_SLOW_MS = 250.0  # a step that takes longer is warmed up once and repeated one by one
_FEWEST = 3  # repetitions, however slow ...
_ONCE_MS = 5000.0  # ... unless it takes longer than this: it is timed once
_PART = "lt_kernels.bench: part"
_CACHE_BYTES = 512 * 2**20  # twice the largest last-level cache of a GPU
_CYCLES_A_MS = 2e6  # of a GPU, at least about
_MOST_HOST_MS = 20.0  # a longer first repetition compiles
_RUN = 20  # steps that the wall clock of a GPU times as one

#: How steps are timed. A CPU always by its wall clock, which is called "device" too. A GPU:
CLOCKS = {
    "device": "by events, so that the host's time does not count",
    "wall": "by the wall clock, one step after the other as in training: whichever is slower, the host or the device",
    "graph": "as a CUDA graph that was captured once and is replayed, by events",
}

#: A step in the parts that are timed one after the other.
Parts = Sequence[Callable[[], object]]
#: Milliseconds of the parts of one repetition.
Times = tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """How long a case and dtype is measured: once without a graph (fwd), once with one (bwd and fwd_bwd)."""

    repetitions: int = 20  # at least, of each provider ...
    seconds: float = 1.0  # ... and until this has passed ...
    limit: float = 6.0  # ... unless it would take longer than this; never fewer than 3, or one of over 5 s
    clock: str = "device"  # a key of CLOCKS


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


class CacheFlush:
    """Fills the last-level cache with clean lines by reading a buffer larger than the cache.

    A write would leave dirty lines, which the device would write back inside the timed region.
    """

    def __init__(self, device: str) -> None:
        self._buffer = torch.ones(_CACHE_BYTES // 4, device=device)  # pages of zeros may be one page

    def __call__(self) -> None:
        self._buffer.sum()


def _time_on_host(parts: Parts) -> Times:
    clock = [time.perf_counter()]
    for part in parts:
        part()
        clock.append(time.perf_counter())
    return tuple((end - start) * 1e3 for start, end in itertools.pairwise(clock))


class _DeviceClock:
    """Times steps on a GPU by events, so that the host's time does not count.

    The device spins while the host runs ahead. Then it flushes its cache, so that a step finds its inputs in memory.
    """

    def __init__(self) -> None:
        self._flush = CacheFlush("cuda")
        self._host_ms: dict[str, float] = {}  # step -> the fewest milliseconds that the host took so far

    def __call__(self, name: str, parts: Parts) -> Times:
        torch.cuda._sleep(int((1.0 + 2.0 * self._host_ms.get(name, 2.0)) * _CYCLES_A_MS))
        self._flush()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        began = time.perf_counter()
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        host_ms = (time.perf_counter() - began) * 1e3
        self._host_ms[name] = min(self._host_ms.get(name, _MOST_HOST_MS), host_ms)
        torch.cuda.synchronize()
        return tuple(start.elapsed_time(end) for start, end in itertools.pairwise(events))


class _WallClock:
    """Times ``_RUN`` steps in a row, the host's work included. A step is one part: the device runs behind the host."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __call__(self, name: str, parts: Parts) -> Times:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(_RUN):
            self._inputs.drop_gradients()
            for part in parts:
                part()
        torch.cuda.synchronize()
        return ((time.perf_counter() - began) * 1e3 / _RUN,)


class _GraphClock:
    """Times replays of captured steps. A step is one part: the graph holds all of it."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._device = _DeviceClock()
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def __call__(self, name: str, parts: Parts) -> Times:
        if name not in self._graphs:
            self._graphs[name] = capture(parts, self._inputs)
        return self._device(name, [self._graphs[name].replay])


def capture(parts: Parts, inputs: Inputs) -> torch.cuda.CUDAGraph:
    """Capture a step as a CUDA graph after it has run on a stream of its own, which compiles what it needs.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_WARMUP):
            inputs.drop_gradients()
            for part in parts:
                part()
    torch.cuda.current_stream().wait_stream(beside)
    inputs.drop_gradients()  # they are then made in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for part in parts:
            part()
    return graph


def measure(steps: Mapping[str, Parts], inputs: Inputs, device: str, timing: Timing) -> dict[str, list[Times]]:
    """Return the milliseconds of every repetition of each step, taken in turns whose order rotates.

    Gradients of ``inputs`` are dropped before each repetition. A CPU is timed by the wall clock, in bursts: a turn
    repeats its step ``_BURST`` times after one untimed repetition, so that a step finds the caches as its own
    repetition left them and not as another provider did. A GPU is timed by ``timing.clock``, one repetition a turn; any
    clock but "device" takes a step for one part. A step beyond ``_SLOW_MS`` is timed once a turn, and its first
    repetition counts. A step beyond ``_ONCE_MS`` is not repeated.
    """
    clock: _DeviceClock | _WallClock | _GraphClock | None = None
    if device == "cuda":
        others: dict[str, type[_WallClock | _GraphClock]] = {"wall": _WallClock, "graph": _GraphClock}
        clock = _DeviceClock() if timing.clock == "device" else others[timing.clock](inputs)

    def once(name: str) -> Times:
        inputs.drop_gradients()
        return _time_on_host(steps[name]) if clock is None else clock(name, steps[name])

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
    burst = 1 if clock is not None else min(_BURST, timing.repetitions)
    turn = 0
    while repeated:
        fewest, elapsed = min(len(times[name]) for name in repeated), time.perf_counter() - started
        if fewest >= timing.repetitions and elapsed >= timing.seconds:
            break
        if fewest >= _FEWEST and elapsed >= timing.limit:
            break
        for position in range(len(repeated)):
            name = repeated[(position + turn) % len(repeated)]
            if name in fast and clock is None:
                once(name)
            times[name] += [once(name) for _ in range(burst if name in fast else 1)]
        turn += 1
    return times


def peak_bytes(parts: Parts, inputs: Inputs, device: str) -> tuple[int | None, list[int]]:
    """Return the most memory allocated at once during the step, beyond what was held before, and the same of each part.

    Memory of live tensors counts, gradients included. On a GPU it is the memory that torch's caching allocator has
    handed out. On a CPU it is every allocation that torch's profiler sees; the reusable buffers of our CPU kernels are
    among them, as long as a tensor lives in one. Scratch memory that libraries and kernels get for themselves is not
    seen. The result is (None, []) where it cannot be known.
    """
    inputs.drop_gradients()
    return _peak_on_gpu(parts) if device == "cuda" else _peak_on_cpu(parts)


def _peak_on_gpu(parts: Parts) -> tuple[int, list[int]]:
    torch.cuda.synchronize()
    starts, tops = [], []
    for part in parts:
        torch.cuda.reset_peak_memory_stats()
        starts.append(torch.cuda.memory_allocated())
        part()
        torch.cuda.synchronize()
        tops.append(torch.cuda.max_memory_allocated())
    return max(tops) - starts[0], [top - start for top, start in zip(tops, starts, strict=True)]


def _peak_on_cpu(parts: Parts) -> tuple[int | None, list[int]]:
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


def quantile(samples: Sequence[float], q: float) -> float:
    """Interpolate linearly between the two nearest of ``samples``."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
