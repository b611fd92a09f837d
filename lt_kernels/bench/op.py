"""The description of one op's benchmark: its cases, providers, costs, agreement and goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ops._device import CHIPS
from .agreement import Agreement
from .cases import Case, Inputs
from .providers import Provider, Step
from .records import Record

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")


class Cost(NamedTuple):
    """The least work for one direction."""

    bytes_moved: int
    flops: int
    exponentials: int

    def static_floor_ms(self, device: str) -> float | None:
        """Return the time that a chip's data sheet and a plain copy allow any kernel; None for a chip not known.

        It is max(bytes / copy bandwidth, operations / peak FLOP/s, exponentials / special-function rate).
        """
        chip = next((chip for name, chip in CHIPS.items() if name in device), None)
        if chip is None:
            return None
        seconds = (self.bytes_moved / chip.bytes, self.flops / chip.flops, self.exponentials / chip.exponentials)
        return 1e3 * max(seconds)


def cost_of_logits(case: Case, dtype: torch.dtype, direction: str, forward: int = 4, backward: int = 4) -> Cost:
    """Count the least work on logits in memory.

        fwd      reads each logit once                            itemsize bytes,     ``forward`` operations
        bwd      reads each logit and writes its gradient         2 * itemsize bytes, ``backward`` operations
        fwd_bwd  reads each logit once, writes its gradient once  2 * itemsize bytes, the operations of both

    and one exponential for each. The four operations of a cross-entropy's pass are a multiply-add, an exponential and
    an addition or multiplication.
    """
    operations = {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[direction]
    passes = 1 if direction == "fwd" else 2
    return Cost(passes * case.logits * dtype.itemsize, operations * case.logits, case.logits)


@dataclass(frozen=True)
class Floor:
    """The time that an op's times are held against, measured in turns with its providers.

    ``copy``: the time that ``bytes_moved`` take at the bandwidth of a copy of the logits into an existing buffer;
    ``gemms``: the time of the provider with that name, the matrix products alone.
    """

    name: str  # copy | gemms
    heading: str  # of a column with the results of ``show``

    def show(self, fraction: float | None) -> str:
        """Format a ``fraction_of_floor`` for people."""
        if fraction is None:
            return ""
        return f"{fraction:.0%}" if self is COPY else f"{1 / fraction:.2f}x"


COPY = Floor("copy", "of copy")
GEMMS = Floor("gemms", "x of gemms")


@dataclass(frozen=True)
class Target:
    """A goal for the last of the op's directions, of ours: by default the provider that the library picks by itself.

    ``against`` says what the number is:

        the name of a provider   ``at_least``: so many times as fast; ``at_most``: so many times its time
        "fastest other"          the same against the fastest provider that is neither ours nor a floor
        "copy"                   that fraction of the copy bandwidth
        "static floor"           the static floor over our time
        "memory"                 the op's ``memory``: peak memory in multiples of the logits' bytes
    """

    device: str  # cpu | cuda
    case: str
    dtype: str
    against: str
    at_least: float | None = None
    at_most: float | None = None
    ours: str | None = None

    def met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


def _default_dtypes() -> dict[str, tuple[str, ...]]:
    return {"cpu": ("float32", "bfloat16"), "cuda": DTYPES}


@dataclass(frozen=True)
class Op:
    """The measurements of one op, and the values they are compared with."""

    name: str
    cases: dict[str, Any]  # name -> Case
    providers: dict[str, Provider]
    cost: Callable[[Any, torch.dtype, str], Cost]  # of a case in a dtype and direction
    agreement: type[Agreement]
    floor: Floor
    rank: int  # its place in lists and reports, by name among equals
    shape: str  # the names of a case's sizes: the heading of a column
    compare_cases: tuple[str, ...]  # cases that `benchmarks/compare.py` measures ...
    references: tuple[str, str]  # ... and the providers whose times divide ours
    eager: str = "eager"  # the provider whose error is the budget of all
    targets: tuple[Target, ...] = ()
    plots: tuple[str, ...] = ()
    directions: tuple[str, ...] = DIRECTIONS  # targets, summaries and plots show the last
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=_default_dtypes)  # device -> dtypes

    def make_step(self, provider: str, inputs: Inputs) -> Step:
        """Make a call without arguments that computes the op on ``inputs``."""
        return self.providers[provider].make(inputs)

    def make_agreement(self, inputs: Inputs) -> Agreement:
        return self.agreement(self.name, inputs, self.make_step(self.eager, inputs))

    def check_agreement(self, provider: str, inputs: Inputs) -> None:
        """Raise AssertionError unless ``provider`` agrees with float64 on ``inputs``; see ``agreement``."""
        self.make_agreement(inputs).check(provider, self.make_step(provider, inputs))

    def memory(self, record: Record) -> float | None:
        """Return peak memory without uncounted gradients, in multiples of the logits' bytes."""
        case: Case | None = self.cases.get(record.case)
        if record.peak_bytes is None or case is None:
            return None
        itemsize = getattr(torch, record.dtype).itemsize
        return (record.peak_bytes - case.uncounted * itemsize) / (case.logits * itemsize)
