"""What a measurement is, where results live, and the environment they were taken in."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__

SCHEMA = 2
_READABLE = (1, 2)  # 1: without static_floor_ms


@dataclass(frozen=True)
class Record:
    """One provider on one case in one dtype and direction. Times in milliseconds, bandwidths in 1e9 bytes a second."""

    op: str
    provider: str
    backend: str | None  # reference | native | triton for ours, None for others
    case: str
    sizes: dict[str, int]
    dtype: str
    direction: str  # fwd | bwd | fwd_bwd
    ms_median: float
    ms_p20: float
    ms_p80: float
    repetitions: int
    peak_bytes: int | None  # allocated beyond what the inputs hold
    bytes_moved: int  # the least that the result needs
    flops: int
    gbps: float  # bytes_moved / ms_median
    copy_gbps: float | None  # a copy of the logits, read + write, measured in the same rounds; None where gemms is
    fraction_of_floor: float | None  # time of the op's floor in the same rounds / ms_median; see Floor
    device: str
    device_slug: str
    versions: dict[str, str | None]
    git: str | None
    static_floor_ms: float | None = None  # roofline.static_floor_ms; None for a chip it does not know

    @property
    def kind(self) -> str:
        """cpu | cuda"""
        return "cpu" if self.device_slug.startswith("cpu-") else "cuda"

    @property
    def group(self) -> tuple[str, str, str]:
        """Records of one group were measured in turns in one run, so their ratios mean something."""
        return (self.op, self.case, self.dtype)


class Cost(NamedTuple):
    """The least work for one direction."""

    bytes_moved: int
    flops: int
    exponentials: int


@dataclass(frozen=True)
class Floor:
    """What an op's times are held against, measured in turns with its providers.

    ``copy``: the time that ``bytes_moved`` take at the bandwidth of a copy of the logits into an existing buffer;
    ``gemms``: the time of the provider with that name, the matrix products alone.
    """

    name: str  # copy | gemms
    heading: str  # of a column with what ``show`` returns

    def show(self, fraction: float | None) -> str:
        """A ``fraction_of_floor`` as people say it."""
        if fraction is None:
            return ""
        return f"{fraction:.0%}" if self is COPY else f"{1 / fraction:.2f}x"


COPY = Floor("copy", "of copy")
GEMMS = Floor("gemms", "x of gemms")

#: Our providers in the order in which the library chooses among them.
PREFERRED = {"cuda": ("lt[triton]", "lt[native]", "lt[reference]"), "cpu": ("lt[native]", "lt[reference]")}


def by_direction(records: Iterable[Record]) -> list[dict[str, Record]]:
    """Provider -> record, for each device, op, case, dtype and direction, in order of appearance."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        key = (record.device_slug, *record.group, record.direction)
        found.setdefault(key, {})[record.provider] = record
    return list(found.values())


def ours(providers: dict[str, Record]) -> Record | None:
    """The record of the backend that the library picks by itself."""
    first = next(iter(providers.values()))
    return next((providers[name] for name in PREFERRED[first.kind] if name in providers), None)


def is_ours(provider: str) -> bool:
    """Whether it is one of our backends, lt[backend], or of our strategies, lt-strategy."""
    return provider.startswith(("lt[", "lt-"))


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


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def device_slug(device: str) -> str:
    """A folder name: ``cpu-<model>-<threads>c`` or the GPU's name."""
    name = device_name(device)
    if device != "cuda":
        name = f"cpu-{name.split(',')[0].removesuffix(' Processor')}-{torch.get_num_threads()}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    from .. import info

    facts = info()
    return {
        "lt_kernels": __version__,
        "python": facts["python"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        "cuda": torch.version.cuda,
        "cpu_capability": facts["cpu_capability"],
    }


def git_revision() -> str | None:
    """Commit of the checkout this package is imported from, with "-dirty" where its code changed; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("LT_KERNELS_GIT_REVISION")  # a copy of a checkout without its history

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)

    try:
        revision = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        changed = git("status", "--porcelain", "--", "lt_kernels", "csrc", "setup.py").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{revision}-dirty" if revision and changed else revision or None


def load(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file, or one of another schema.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        schema, entries = content["schema"], content["records"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: expected a results file of `lt-kernels bench`") from None
    if schema not in _READABLE:
        raise ValueError(f"{path}: got schema {schema!r}, expected one of {_READABLE}")
    return [Record(**record) for record in entries]


def save(path: Path, records: list[Record]) -> None:
    """Write ``records`` to ``path``, in place of those of the same groups (op, case, dtype) that are there."""
    measured = {record.group for record in records}
    kept = [record for record in load(path) if record.group not in measured] if path.exists() else []
    lines = ",\n  ".join(json.dumps(asdict(record)) for record in kept + records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"schema": {SCHEMA}, "records": [\n  {lines}\n]}}\n')
